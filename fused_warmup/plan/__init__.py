"""The packed table of one step: which memory it reads and writes."""
