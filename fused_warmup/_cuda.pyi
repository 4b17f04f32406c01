CARRY_LIMIT: int

def rules() -> tuple[str, ...]: ...
def prepare(rule: int, device: int, doubles: bool) -> None: ...
def step(
    rule: int,
    address: int,
    grads: int,
    n_grads: int,
    doubles: bool,
    device: int,
    stream: int,
    max_blocks: int = 0,
) -> None: ...
def vectors(operation: int, address: int, device: int, stream: int, max_blocks: int = 0) -> None: ...
