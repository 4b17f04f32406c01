"""Translate PTX, the text that nvcc and Triton emit, into C++ for the machine of ``machine.h``.

Each instruction becomes one statement with the meaning that the PTX ISA gives it. One that is unknown here stops the
translation with its name and line.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field

# where the variables of shared and of local memory begin; addresses of host memory are larger
SHARED_BEGIN, SHARED_LIMIT = 0x10000, 0x200000
LOCAL_BEGIN, LOCAL_LIMIT = 0x1000, 0x3000
# unused bytes between variables of shared memory, so that no access beyond the end of one is inside the next
GAP = 64
# shared memory whose size is chosen at the launch
DYNAMIC_BYTES = 1 << 16

SPECIAL = {
    "%tid.x": "t.index",
    "%ntid.x": "t.block->n_threads",
    "%ctaid.x": "t.block->index",
    "%nctaid.x": "t.block->n_blocks",
    "%laneid": "(t.index % 32)",
    "%warpid": "(t.index / 32)",
    **{f"%{name}.{axis}": "0" for name in ("tid", "ctaid") for axis in "yz"},
    **{f"%{name}.{axis}": "1" for name in ("ntid", "nctaid") for axis in "yz"},
}

# C++ of an operation on the operands {0}, {1} and {2}, which read registers only
FLOATS = {
    "add": "{0} + {1}",
    "sub": "{0} - {1}",
    "mul": "{0} * {1}",
    "div": "{0} / {1}",
    "fma": "std::fma({0}, {1}, {2})",
    "sqrt": "std::sqrt({0})",
    "rcp": "1 / {0}",
    "neg": "-{0}",
    "abs": "std::fabs({0})",
    "min": "std::fmin({0}, {1})",
    "max": "std::fmax({0}, {1})",
}
INTEGERS = {
    "add": "{0} + {1}",
    "sub": "{0} - {1}",
    "neg": "0 - {0}",
    "mul.lo": "{0} * {1}",
    "mad.lo": "{0} * {1} + {2}",
    "min": "{0} < {1} ? {0} : {1}",
    "max": "{0} < {1} ? {1} : {0}",
    "min.relu": "({0} < {1} ? {0} : {1}) > 0 ? ({0} < {1} ? {0} : {1}) : 0",
    "abs": "{0} < 0 ? 0 - {0} : {0}",
    "shr": "shift_right({0}, {1})",
    "shl": "shift_left({0}, {1})",
    "and": "{0} & {1}",
    "or": "{0} | {1}",
    "xor": "{0} ^ {1}",
    "not": "~{0}",
    "mul.hi": "high_half({0}, {1})",
    "popc": "__builtin_popcountll({0})",
    "clz": "leading_zeros({0})",
    "prmt": "permute_bytes({0}, {1}, {2})",
    "lop3": "any_logic({0}, {1}, {2}, {3})",
    "bfe": "bit_field({0}, {1}, {2})",
    "shf.l.wrap": "funnel_left({0}, {1}, {2})",
    "shf.r.wrap": "funnel_right({0}, {1}, {2})",
}
# operands with another type than the instruction names: a count or a position
COUNTS = {("shr", 1), ("shl", 1), ("bfe", 1), ("bfe", 2), ("shf.l.wrap", 2), ("shf.r.wrap", 2)}
PREDICATES = {"and": "{0} && {1}", "or": "{0} || {1}", "xor": "{0} != {1}", "not": "!{0}"}
COMPARISONS = {"eq": "==", "ne": "!=", "lt": "<", "le": "<=", "gt": ">", "ge": ">="}
COMPARISONS |= {"lo": "<", "ls": "<=", "hi": ">", "hs": ">="}
# false where an operand is NaN, as all others in C++, and true where one is
ORDERED = {"ne": "{0} < {1} || {0} > {1}", "num": "{0} == {0} && {1} == {1}"}
UNORDERED = {
    "equ": "!({0} < {1} || {0} > {1})",
    "neu": "{0} != {1}",
    "ltu": "!({0} >= {1})",
    "leu": "!({0} > {1})",
    "gtu": "!({0} <= {1})",
    "geu": "!({0} < {1})",
    "nan": "{0} != {0} || {1} != {1}",
}
ATOMICS = {
    "add": "x + y",
    "min": "y < x ? y : x",
    "max": "x < y ? y : x",
    "exch": "y",
    "or": "x | y",
    "and": "x & y",
}
TO_INTEGRAL = {"rni": "std::nearbyint", "rzi": "std::trunc", "rmi": "std::floor", "rpi": "std::ceil"}
# conversions that involve 16-bit floats, by modifiers, destination and source
HALVES = {
    ("", "f32", "f16"): ("float_of_half({0})", "f32"),
    ("", "f32", "bf16"): ("float_of_bfloat16({0})", "f32"),
    ("", "f64", "f16"): ("double(float_of_half({0}))", "f64"),
    ("", "f64", "bf16"): ("double(float_of_bfloat16({0}))", "f64"),
    ("rn", "f16", "f32"): ("half_of({0})", "b16"),
    ("rn", "bf16", "f32"): ("bfloat16_of({0})", "b16"),
    ("rn", "f16x2", "f32"): ("uint32_t(half_of({0})) << 16 | half_of({1})", "b32"),
    ("rn", "bf16x2", "f32"): ("uint32_t(bfloat16_of({0})) << 16 | bfloat16_of({1})", "b32"),
}


class UnknownPtx(Exception):
    """Raised for PTX whose meaning is not known here."""


def bits_of(kind: str) -> int:
    """Return the number of bits of a PTX type such as u32."""
    return 1 if kind == "pred" else int(re.sub(r"\D+(\d+)$", r"\1", kind))


def is_float(kind: str) -> bool:
    """Return whether a PTX type is float32 or float64, which instructions compute in."""
    return kind in ("f32", "f64")


def cpp_type(kind: str) -> str:
    """Return the C++ type of a value of a PTX type."""
    if kind == "pred":
        return "bool"
    if is_float(kind):
        return "float" if kind == "f32" else "double"
    return f"{'' if kind[0] == 's' else 'u'}int{bits_of(kind)}_t"


def plain(name: str, prefix: str) -> str:
    """Return a C++ name for a name of PTX."""
    return prefix + re.sub(r"\W", "_", name.lstrip("%"))


def split_list(text: str) -> list[str]:
    """Split at the commas outside of brackets."""
    return [
        part.strip() for part in re.findall(r"(?:[^,\[\](){}]|[\[({][^\])}]*[\])}])+", text) if part.strip()
    ]


def statements(text: str) -> Iterator[tuple[str, int]]:
    """Yield statements, labels with a colon, function headers and braces of blocks, each with its line."""
    text = re.sub(r"/\*.*?\*/", lambda match: "\n" * match[0].count("\n"), text, flags=re.S)
    text = re.sub(r"//[^\n]*", "", text)
    # these end with their line, or are for a debugger
    text = re.sub(r"(?m)^[ \t]*\.(version|target|address_size|file|loc)\b[^\n]*", "", text)
    text = re.sub(r"\.section[^{]*\{[^}]*\}", lambda match: "\n" * match[0].count("\n"), text)
    current, line, first = "", 1, 1
    for piece in re.split(r"([{};:\n])", text):
        if piece == "\n":
            line += 1
        whole = " ".join(current.split())
        if piece == ";":
            yield whole, first
        elif piece == ":" and re.fullmatch(r"[\w$]+", whole):
            yield whole + ":", first
        elif piece == "{" and re.search(r"\.(entry|func)\b", whole):
            yield whole, first
            yield "{", line
        elif piece in "{}" and piece and not whole:
            yield piece, line
        else:
            if not whole:
                first = line
            current += piece
            continue
        current = ""


@dataclass
class Module:
    """The declarations and functions of a PTX text, before they are translated."""

    text: str
    symbols: dict[str, tuple[str, str]] = field(default_factory=dict)
    tables: list[str] = field(default_factory=list)
    shared: dict[str, tuple[int, int]] = field(default_factory=dict)
    functions: dict[str, tuple[str, list[tuple[str, int]]]] = field(default_factory=dict)
    shared_end: int = SHARED_BEGIN
    local_end: int = LOCAL_BEGIN

    def declare(self, text: str) -> None:
        """Give a variable of shared memory its place, or a table of constants its C++."""
        pattern = r"(?:\.\w+ )*?\.(shared|global|const) (?:\.align (\d+) )?\.(\w+) ([\w$]+)(\[(\d*)\])?(?: ?= ?(.*))?"
        match = re.fullmatch(pattern, text)
        if not match:
            raise UnknownPtx(f"declaration {text}")
        space, align, kind, name, array, count, values = match.groups()
        size = bits_of(kind) // 8 * int(count or 1)
        if space == "shared":
            if name in self.shared:
                return
            size = DYNAMIC_BYTES if array == "[]" else size
            step = int(align or bits_of(kind) // 8)
            begin = -(-self.shared_end // step) * step
            self.shared[name] = (begin, size)
            self.shared_end = begin + size + GAP
            if self.shared_end > SHARED_LIMIT:
                raise UnknownPtx(f"shared memory up to {self.shared_end}")
            self.symbols[name] = ("shared", hex(begin))
            return
        if bits_of(kind) != 8 or not values:
            raise UnknownPtx(f"declaration {text}")
        table = plain(name, "table_")
        self.tables.append(f"alignas(16) const unsigned char {table}[{size}] = {values};")
        self.symbols[name] = ("global", f"uint64_t({table})")

    def entries(self) -> list[str]:
        """Return the names of the kernels."""
        return [name for name, (header, _) in self.functions.items() if ".entry" in header]

    def translate(self, entry: str) -> str:
        """Return the C++ of one kernel, of the functions that it calls and of its description."""
        kernel = Function(self, entry)
        body = kernel.translate()
        called = [Function(self, name).translate() for name in sorted(kernel.called)]
        variables = ", ".join(f'{{{b}, {b + n}, "{name}"}}' for name, (b, n) in self.shared.items())
        sizes = ", ".join(str(size) for _, size in kernel.params)
        bound = re.search(r"\.(?:max|req)ntid (\d+)", kernel.header)
        return "\n".join([
            '#include "machine.h"',
            "using namespace ptx;",
            "namespace {",
            *self.tables,
            *called,
            body,
            f"const Variable variables[] = {{{variables or '{0, 0, nullptr}'}}};",
            f"const unsigned sizes[] = {{{sizes or '0'}}};",
            "}",
            f'extern "C" __attribute__((visibility("default"))) const Entry entry = {{"{entry}", kernel, '
            f"{bound[1] if bound else 1024}, sizes, {len(kernel.params)}, variables, {len(self.shared)}, "
            f"{self.shared_end - SHARED_BEGIN}}};\n",
        ])


def parse(text: str) -> Module:
    """Collect the functions and the memory of a PTX text."""
    module, header, depth = Module(text), "", 0
    for statement, line in statements(text):
        if statement == "{" and depth == 0:
            name = re.search(r"\.(?:entry|func) ?(?:\([^)]*\) ?)?([\w$]+)", header)
            assert name, header
            body: list[tuple[str, int]] = []
            module.functions[name[1]] = (header, body)
        depth += (statement == "{") - (statement == "}")
        if depth > 0:
            body.append((statement, line))
        # memory has its place before any instruction is translated
        if re.match(r"(\.\w+ )*?\.(shared|global|const)\b", statement) and "(" not in statement:
            module.declare(statement)
        elif depth == 0 and statement != "}":
            # of a function, or of one that is defined later
            header = statement
            if not re.search(r"\.(entry|func)\b", header):
                raise UnknownPtx(f"line {line}: {header}")
    return module


class Function:
    """One function of a module, and what its translation has to look up."""

    def __init__(self, module: Module, name: str) -> None:
        self.module, self.name = module, name
        self.header, self.body = module.functions[name]
        self.is_kernel = ".entry" in self.header
        # names in the blocks that are open: of registers their bits, of parameters of calls their C++
        self.scopes: list[dict[str, int]] = [{}]
        self.symbols = dict(module.symbols)
        self.called: set[str] = set()
        self.label = ""
        self.targets: dict[str, list[str]] = {}
        self.line = 0
        listed = re.search(re.escape(name) + r" ?\((.*)\)", self.header)
        self.params = [self._parameter(text) for text in split_list(listed[1])] if listed else []
        for i, (param, _) in enumerate(self.params):
            cpp = f"uint64_t(t.block->params[{i}])" if self.is_kernel else f"uint64_t({plain(param, 'p_')})"
            self.symbols[param] = ("param" if self.is_kernel else "raw", cpp)
        returned = re.search(r"\.func ?\((.*?)\)", self.header)
        self.result = self._parameter(returned[1]) if returned else None
        if self.result:
            self.symbols[self.result[0]] = ("raw", f"uint64_t({plain(self.result[0], 'p_')})")

    @staticmethod
    def _parameter(text: str) -> tuple[str, int]:
        """Return name and bytes of a parameter."""
        match = re.search(r"\.([busf]\d+)\b.*?([\w$]+)(?:\[(\d+)\])?$", text)
        assert match, text
        return match[2], bits_of(match[1]) // 8 * int(match[3] or 1)

    def translate(self) -> str:
        """Return the C++ of the function."""
        code = []
        for statement, line in self.body:
            self.line = line
            code.append(self.statement(statement))
        if self.is_kernel:
            return (
                "void kernel(Thread& t) {\nuint32_t carry = 0;\n(void)carry;\n" + "\n".join(code[1:]) + "\n}"
            )
        outputs = [self.result] if self.result else []
        arguments = [f"unsigned char* {plain(name, 'p_')}" for name, _ in (*outputs, *self.params)]
        signature = f"void {plain(self.name, 'f_')}({', '.join(['Thread& t', *arguments])})"
        return signature + " {\nuint32_t carry = 0;\n(void)carry, (void)t;\n" + "\n".join(code[1:]) + "\n}"

    def statement(self, text: str) -> str:
        """Return the C++ of a statement, a label or a brace."""
        if text in ("{", "}"):
            if text == "{":
                self.scopes.append({})
            else:
                self.scopes.pop()
            return text
        if text.endswith(":"):
            self.label = text[:-1]
            return f"{plain(text[:-1], 'at_')}: ;"
        if text.startswith("."):
            return self.declaration(text)
        guard = re.match(r"@(!?%\S+) (.*)", text)
        operation, _, rest = (guard[2] if guard else text).partition(" ")
        try:
            code = self.instruction(operation, split_list(rest))
        except (KeyError, IndexError, ValueError, AttributeError) as error:
            raise UnknownPtx(f"line {self.line}: {text}") from error
        return f"if ({self.value(guard[1], 'pred')}) {{ {code} }}" if guard else code

    def declaration(self, text: str) -> str:
        """Return the C++ of a declaration inside a function."""
        if match := re.match(r"\.reg \.(\w+) (.*)", text):
            bits, names = bits_of(match[1]), []
            for name in split_list(match[2]):
                many = re.fullmatch(r"(.*)<(\d+)>", name)
                names += [f"{many[1]}{i}" for i in range(int(many[2]))] if many else [name]
            self.scopes[-1].update(dict.fromkeys(names, bits))
            kind = "bool" if bits == 1 else f"uint{bits}_t"
            # no jump may pass an initialization; at the start of the function there is none
            start = (
                "" if len(self.scopes) > 2 else " = false" if bits == 1 else f" = {kind}(0xdeadbeefdeadbeef)"
            )
            return f"{kind} " + ", ".join(plain(name, "r_") + start for name in names) + ";"
        if match := re.match(r"\.param (?:\.align \d+ )?\.(\w+) ([\w$]+)(?:\[(\d+)\])?$", text):
            self.symbols[match[2]] = ("raw", f"uint64_t({plain(match[2], 'p_')})")
            size = bits_of(match[1]) // 8 * int(match[3] or 1)
            return f"alignas(16) unsigned char {plain(match[2], 'p_')}[{size}];"
        if match := re.match(r"\.local (?:\.align \d+ )?\.(\w+) ([\w$]+)\[(\d+)\]$", text):
            begin = -(-self.module.local_end // 16) * 16
            self.module.local_end = begin + bits_of(match[1]) // 8 * int(match[3])
            if self.module.local_end > LOCAL_LIMIT:
                raise UnknownPtx(f"line {self.line}: local memory up to {self.module.local_end}")
            self.symbols[match[2]] = ("local", hex(begin))
            return ""
        if match := re.match(r"\.branchtargets (.*)", text):
            self.targets[self.label] = split_list(match[1])
            return ""
        if re.match(r"\.(shared|pragma)\b", text):
            return ""
        raise UnknownPtx(f"line {self.line}: {text}")

    def bits_of_register(self, token: str) -> int | None:
        """Return the bits of a register, or None for another name."""
        return next((scope[token] for scope in reversed(self.scopes) if token in scope), None)

    def value(self, token: str, kind: str) -> str:
        """Return an operand as a C++ value of a PTX type."""
        wanted = cpp_type(kind)
        if token.startswith("!"):
            return "!" + self.value(token[1:], kind)
        if token in SPECIAL:
            return f"{wanted}({SPECIAL[token]})"
        if bits := self.bits_of_register(token):
            name = plain(token, "r_")
            if is_float(kind):
                # bits of another number would be another value
                if bits != bits_of(kind):
                    raise ValueError(token)
                return f"as_{wanted}({name})"
            return name if bits == bits_of(kind) and wanted[0] != "i" else f"{wanted}({name})"
        if re.fullmatch(r"0[fFdD][0-9a-fA-F]+", token):
            pattern = f"0x{token[2:]}{'u' if len(token) == 10 else 'ull'}"
            return f"as_{wanted}({pattern})" if is_float(kind) else pattern
        if re.fullmatch(r"-?(0x[0-9a-fA-F]+|\d+)U?", token):
            number = int(token.rstrip("U"), 0)
            if is_float(kind):
                raise ValueError(token)
            return (
                ("false", "true")[number]
                if kind == "pred"
                else f"{wanted}({number % 2 ** bits_of(kind):#x}ull)"
            )
        return f"{wanted}({self.place(token)[1]})"

    def place(self, text: str) -> tuple[str, str]:
        """Return the space and the address of a symbol or register with an offset."""
        match = re.fullmatch(r"([%\w$]+)\s*(?:\+\s*(-?\d+))?", text)
        if not match:
            raise ValueError(text)
        name, offset = match[1], int(match[2] or 0)
        if self.bits_of_register(name):
            space, address = "", f"uint64_t({plain(name, 'r_')})"
        else:
            space, address = self.symbols[name]
        return (
            space,
            f"{address} + {offset}" if offset > 0 else f"{address} - {-offset}" if offset else address,
        )

    def assign(self, token: str, expression: str, kind: str) -> str:
        """Return the statement that stores a value of a PTX type in a register, which may be wider."""
        if token == "_":
            return f"(void)({expression});"
        bits = self.bits_of_register(token)
        if bits is None or bits < bits_of(kind) or (is_float(kind) and bits != bits_of(kind)):
            raise ValueError(token)
        if is_float(kind):
            return f"{plain(token, 'r_')} = bits_of({expression});"
        # a narrower result is extended as its type has a sign or none
        return f"{plain(token, 'r_')} = {cpp_type(kind)}({expression});"

    def instruction(self, operation: str, operands: list[str]) -> str:
        """Return the C++ of an instruction."""
        parts = operation.split(".")
        base, kind = parts[0], parts[-1]
        special = {
            "ld": self.memory,
            "st": self.memory,
            "atom": self.atomic,
            "bar": self.synchronize,
            "barrier": self.synchronize,
            "membar": self.synchronize,
            "fence": self.synchronize,
            "shfl": self.shuffle,
            "redux": self.reduce,
            "call": self.call,
            "mov": self.move,
            "cvt": self.convert,
            "setp": self.compare,
        }
        if base in special:
            return special[base](parts, operands)
        if base == "bra":
            return f"goto {plain(operands[0], 'at_')};"
        if operation == "brx.idx":
            cases = enumerate(self.targets[operands[1]])
            jumps = " ".join(f"case {i}: goto {plain(name, 'at_')};" for i, name in cases)
            return f"switch ({self.value(operands[0], 'u32')}) {{ {jumps} }}"
        if base in ("ret", "exit"):
            return "return;"
        if base == "cvta":
            return self.assign(operands[0], self.value(operands[1], kind), kind)
        if base == "selp":
            condition = self.value(operands[3], "pred")
            chosen = [self.value(operand, kind) for operand in operands[1:3]]
            return self.assign(operands[0], f"{condition} ? {chosen[0]} : {chosen[1]}", kind)
        if (base.endswith("c") and base[:-1] in ("add", "sub", "mad")) or "cc" in parts:
            return self.with_carry(parts, operands)
        if kind == "f32x2":
            return self.pair(parts, operands)
        return self.arithmetic(parts, operands)

    def arithmetic(self, parts: list[str], operands: list[str]) -> str:
        """Return the C++ of an operation on numbers or predicates."""
        base, kind, name = parts[0], parts[-1], ".".join(parts[:-1])
        if is_float(kind) or kind == "f16":
            return self.floating(parts, operands)
        inputs = [
            self.value(operand, "u32" if (name, i) in COUNTS else kind)
            for i, operand in enumerate(operands[1:])
        ]
        if kind == "pred":
            return self.assign(operands[0], PREDICATES[name].format(*inputs), kind)
        if "wide" in parts:
            wide = kind[0] + str(2 * bits_of(kind))
            product = " * ".join(f"{cpp_type(wide)}({value})" for value in inputs[:2])
            if base == "mad":
                product += f" + {self.value(operands[3], wide)}"
            return self.assign(operands[0], product, wide)
        if name in ("div", "rem"):
            call = f"{'quotient' if name == 'div' else 'rest'}(t, {inputs[0]}, {inputs[1]}, {self.line})"
            return self.assign(operands[0], call, kind)
        result = "u32" if name in ("popc", "clz") else kind
        return self.assign(operands[0], INTEGERS[name].format(*inputs), result)

    def floating(self, parts: list[str], operands: list[str]) -> str:
        """Return the C++ of an operation on floats, which rounds to nearest and keeps subnormals."""
        base, kind, name = parts[0], parts[-1], ".".join(parts)
        if kind == "f16":
            # float16 operands that are widened and a float32, as in sub.rn.f32.f16
            if parts[1:] != ["rn", "f32", "f16"] or base not in ("add", "sub", "fma"):
                raise ValueError(name)
            # the operands of the narrow type come first
            *narrow, wide = operands[1:]
            inputs = [f"float_of_half({self.value(operand, 'b16')})" for operand in narrow]
            return self.assign(operands[0], FLOATS[base].format(*inputs, self.value(wide, "f32")), "f32")
        inputs = [self.value(operand, kind) for operand in operands[1:]]
        if name == "rcp.approx.ftz.f64":
            return self.assign(operands[0], f"rough_reciprocal({inputs[0]})", kind)
        if name == "abs.ftz.f32":
            return self.assign(operands[0], f"flush(std::fabs({inputs[0]}))", kind)
        # without rn the assembler may contract products and sums
        exact = base in ("neg", "abs", "min", "max")
        if parts[1:-1] != ([] if exact else ["rn"]):
            raise ValueError(name)
        return self.assign(operands[0], FLOATS[base].format(*inputs), kind)

    def pair(self, parts: list[str], operands: list[str]) -> str:
        """Return the C++ of an operation on two floats in one register."""
        if parts[1:-1] != ["rn"]:
            raise ValueError(parts)
        inputs = [self.value(operand, "b64") for operand in operands[1:]]
        halves = [
            FLOATS[parts[0]].format(*(f"as_float(uint32_t({value} >> {shift}))" for value in inputs))
            for shift in (0, 32)
        ]
        joined = f"bits_of({halves[0]}) | uint64_t(bits_of({halves[1]})) << 32"
        return self.assign(operands[0], joined, "b64")

    def with_carry(self, parts: list[str], operands: list[str]) -> str:
        """Return the C++ of a sum, difference or product that takes or leaves a carry bit."""
        base, kind = parts[0].removesuffix("c"), parts[-1]
        bits = bits_of(kind)
        wide = "uint64_t" if bits == 32 else "unsigned __int128"
        values = [f"{wide}({self.value(operand, f'u{bits}')})" for operand in operands[1:]]
        first = values[0]
        if base == "mad":
            if kind[0] != "u":
                raise ValueError(parts)
            product = f"{values[0]} * {values[1]}"
            first = f"{wide}(uint{bits}_t({product}))" if "lo" in parts else f"(({product}) >> {bits})"
        sign = "-" if base == "sub" else "+"
        carried = f" {sign} carry" if parts[0] in ("addc", "subc", "madc") else ""
        leave = f"carry = uint32_t(sum >> {bits}) & 1; " if "cc" in parts else ""
        assigned = self.assign(operands[0], "sum", f"u{bits}")
        return f"{{ const {wide} sum = {first} {sign} {values[-1]}{carried}; {leave}{assigned} }}"

    def memory(self, parts: list[str], operands: list[str]) -> str:
        """Return the C++ of a load or store of one or several elements."""
        load, kind = parts[0] == "ld", parts[-1]
        names, text = operands if load else reversed(operands)
        registers = split_list(names.strip("{}"))
        count = next((int(part[1:]) for part in parts if re.fullmatch(r"v[248]", part)), 1)
        if len(registers) != count:
            raise ValueError(names)
        found, address = self.place(text.strip("[] "))
        named = (part.split("::")[0] for part in parts)
        space = next(
            (part for part in named if part in ("global", "shared", "param", "local", "const")), "generic"
        )
        # the parameters of a call are variables of the caller
        space = "raw" if found == "raw" else "global" if space == "const" else space
        bits = bits_of(kind)
        kind = kind if kind[0] == "s" else f"b{bits}"
        array, tail = f"uint{bits}_t v[{count}]", f"(t, {address}, v, {self.line});"
        if load:
            taken = " ".join(
                self.assign(register, f"{cpp_type(kind)}(v[{i}])", kind)
                for i, register in enumerate(registers)
            )
            return f"{{ {array}; load<k{space.title()}>{tail} {taken} }}"
        values = ", ".join(self.value(register, f"b{bits}") for register in registers)
        return f"{{ const {array} = {{{values}}}; store<k{space.title()}>{tail} }}"

    def atomic(self, parts: list[str], operands: list[str]) -> str:
        """Return the C++ of an atomic operation."""
        kind, space = parts[-1], parts[1].title()
        ordering = next((part for part in parts if part in ("acquire", "release", "acq_rel")), "relaxed")
        if ordering not in ("relaxed", "acq_rel") or space not in ("Global", "Shared"):
            raise ValueError(parts)
        function = next(ATOMICS[part] for part in parts[2:-1] if part in ATOMICS)
        number = cpp_type(kind)
        address = self.place(operands[1].strip("[] "))[1]
        lambda_ = f"[]({number} x, {number} y) -> {number} {{ return (void)x, {function}; }}"
        call = (
            f"atomic<k{space}, {number}>(t, {address}, {self.value(operands[2], kind)}, {lambda_}, "
            f"{'true' if ordering == 'acq_rel' else 'false'}, {self.line})"
        )
        return self.assign(operands[0], call, kind)

    def synchronize(self, parts: list[str], operands: list[str]) -> str:
        """Return the C++ of a barrier or a fence."""
        name = ".".join(parts)
        if name in ("bar.sync", "barrier.sync", "barrier.cta.sync.aligned") and operands == ["0"]:
            return f"barrier(t, {self.line});"
        if name == "bar.warp.sync":
            return f"warp_barrier(t, {self.line});"
        if parts[0] in ("membar", "fence") and parts[1] in ("gl", "sc", "acq_rel"):
            return f"fence(t, {self.line});"
        raise ValueError(name)

    def shuffle(self, parts: list[str], operands: list[str]) -> str:
        """Return the C++ of an exchange between the threads of a warp."""
        if parts[:2] != ["shfl", "sync"] or parts[2] not in ("up", "down", "bfly", "idx"):
            raise ValueError(parts)
        destination, _, valid = operands[0].partition("|")
        inputs = ", ".join(self.value(operand, "b32") for operand in operands[1:])
        call = f"const Shuffled s = shuffle_{parts[2]}(t, {inputs}, {self.line});"
        stored = self.assign(valid, "s.valid", "pred") if valid else ""
        return f"{{ {call} {self.assign(destination, 's.value', 'b32')} {stored} }}"

    def reduce(self, parts: list[str], operands: list[str]) -> str:
        """Return the C++ of a reduction over the threads of a warp."""
        function, kind = parts[2], parts[-1]
        number = cpp_type(kind)
        lambda_ = f"[]({number} x, {number} y) -> {number} {{ return {ATOMICS[function]}; }}"
        inputs = ", ".join(self.value(operand, kind) for operand in operands[1:2])
        mask = self.value(operands[2], "b32")
        call = f"reduce_warp<{number}>(t, {inputs}, {mask}, {lambda_}, {self.line})"
        return self.assign(operands[0], call, kind)

    def call(self, parts: list[str], operands: list[str]) -> str:
        """Return the C++ of a call, whose result and arguments are variables of the caller."""
        names = [name for operand in (operands[0], operands[2]) for name in split_list(operand.strip("() "))]
        self.called.add(operands[1])
        pointers = ", ".join(plain(name, "p_") for name in names)
        return f"{plain(operands[1], 'f_')}(t, {pointers});"

    def move(self, parts: list[str], operands: list[str]) -> str:
        """Return the C++ of a copy, or of one that joins or splits registers."""
        kind = parts[-1]
        if kind == "pred":
            return self.assign(operands[0], self.value(operands[1], kind), kind)
        bits = bits_of(kind)
        number = f"uint{bits}_t"
        for side, other in ((0, 1), (1, 0)):
            if not operands[side].startswith("{"):
                continue
            halves = split_list(operands[side].strip("{}"))
            part = bits // len(halves)
            if side == 0:
                whole = self.value(operands[other], f"b{bits}")
                taken = (self.assign(r, f"v >> {i * part}", f"b{part}") for i, r in enumerate(halves))
                return f"{{ const {number} v = {whole}; {' '.join(taken)} }}"
            pieces = (f"{number}({self.value(r, f'b{part}')}) << {i * part}" for i, r in enumerate(halves))
            return self.assign(operands[0], " | ".join(pieces), f"b{bits}")
        return self.assign(operands[0], self.value(operands[1], f"b{bits}"), f"b{bits}")

    def convert(self, parts: list[str], operands: list[str]) -> str:
        """Return the C++ of a conversion."""
        to, source, how = parts[-2], parts[-1], parts[1:-2]
        halves = HALVES.get((".".join(how), to, source))
        if halves:
            values = [self.value(operand, source if is_float(source) else "b16") for operand in operands[1:]]
            return self.assign(operands[0], halves[0].format(*values), halves[1])
        value = self.value(operands[1], source)
        number = cpp_type(to)
        if is_float(source) and how and how != ["rn"]:
            (rounding,) = how
            integral = f"{TO_INTEGRAL[rounding]}({value})"
            if not is_float(to):
                integral = f"saturated<{number}>({integral})"
            elif to != source:
                raise ValueError(parts)
            return self.assign(operands[0], integral, to)
        # integers need no rounding among each other, and neither does a widened float
        exact = not is_float(to) or (is_float(source) and bits_of(to) >= bits_of(source))
        if is_float(source) > is_float(to) or how != ([] if exact else ["rn"]):
            raise ValueError(parts)
        return self.assign(operands[0], f"{number}({value})", to)

    def compare(self, parts: list[str], operands: list[str]) -> str:
        """Return the C++ of a comparison, which another predicate may be joined to."""
        name, kind = parts[1], parts[-1]
        x, y = (self.value(operand, kind) for operand in operands[1:3])
        if is_float(kind) and name in (ORDERED | UNORDERED):
            found = "(" + (ORDERED | UNORDERED)[name].format(x, y) + ")"
        else:
            found = f"({x} {COMPARISONS[name]} {y})"
        if len(parts) == 4:
            found = PREDICATES[parts[2]].format(found, self.value(operands[3], "pred"))
        return self.assign(operands[0], found, "pred")
