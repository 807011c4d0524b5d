"""Which instructions of a PTX kernel can run before which others: its control flow, walked from the entry."""

from __future__ import annotations

import re
from dataclasses import dataclass

#: What touches memory, unless its state space says that it is none that other kernels see.
TOUCHES = re.compile(
    r"(ld|ldu|st|atom|red|cp|prefetchu?|tex|tld4|txq|suld|sust|sured|multimem|applypriority|discard)\b"
)
PRIVATE = re.compile(r"\.(param|shared|const|local)\b")
#: After which nothing is known: code that is not here.
UNKNOWN = re.compile(r"(call|brx)\b")


@dataclass(frozen=True)
class Statement:
    opcode: str  # "ld.global.f32"
    operands: str
    guarded: bool  # by a predicate


@dataclass(frozen=True)
class Kernel:
    statements: list[Statement]
    labels: dict[str, int]

    def opcodes(self) -> list[str]:
        return [statement.opcode for statement in self.statements]

    def before(self, stop: str) -> list[Statement]:
        """All that can run before an instruction `stop` has, on whatever path from the entry."""
        seen, queue = set(), [0]
        while queue:
            at = queue.pop()
            if at in seen or at >= len(self.statements):
                continue
            statement = self.statements[at]
            stops = statement.opcode == stop
            if stops and not statement.guarded:
                continue
            seen.add(at)
            if re.match(r"bra\b", statement.opcode):
                queue.append(self.labels[statement.operands.strip()])
            if statement.guarded or not re.match(r"(bra|ret|exit|trap)\b", statement.opcode):
                queue.append(at + 1)
        return [self.statements[at] for at in sorted(seen)]

    def touched_before(self, stop: str) -> list[Statement]:
        """Of these, those that may touch global memory."""
        return [s for s in self.before(stop) if touches_global(s)]


def touches_global(statement: Statement) -> bool:
    opcode = statement.opcode
    return bool(UNKNOWN.match(opcode)) or bool(TOUCHES.match(opcode) and not PRIVATE.search(opcode))


def kernels(ptx: str) -> dict[str, Kernel]:
    """By their mangled names."""
    text = re.sub(r"//[^\n]*|/\*.*?\*/", "", ptx, flags=re.DOTALL)
    found = {}
    for entry in re.split(r"\.entry\s+", text)[1:]:
        name = re.match(r"[\w$]+", entry)[0]
        found[name] = _parse(_body(entry))
    return found


def _body(text: str) -> str:
    """Between the first brace and the one that closes it."""
    begin = text.index("{")
    depth = 0
    for at in range(begin, len(text)):
        depth += {"{": 1, "}": -1}.get(text[at], 0)
        if text[at] == "}" and depth == 0:
            return text[begin + 1 : at]
    raise ValueError("a kernel without an end")


def _parse(body: str) -> Kernel:
    statements, labels = [], {}
    # Braces of scopes, not those of vectors: "{" or "}" alone on a line, or before and behind a statement.
    for piece in re.split(r";|^\s*[{}]|[{}]\s*$", body, flags=re.MULTILINE):
        piece = piece.strip()
        while found := re.match(r"([\w$%]+):\s*", piece):
            labels[found[1]] = len(statements)
            piece = piece[found.end() :]
        if not piece or piece.startswith("."):
            continue
        found = re.fullmatch(r"(@!?%?\w+\s+)?([a-z][\w.:]*)\s*(.*)", piece, re.DOTALL)
        if found is None:
            raise ValueError(f"no PTX statement: {piece}")
        statements.append(Statement(found[2], found[3], bool(found[1])))
    return Kernel(statements, labels)
