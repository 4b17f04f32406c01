"""Which process groups a tensor is spread over, and means over them."""
