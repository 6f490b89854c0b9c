"""What is known of ops: why each is int8 or float, who decided that, what would change it."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Final

from fxquant.graph.text import shown

_NAME: Final = 80
_SENTENCE: Final = 400
_MOST: Final = 6
"""How many near misses of one op are shown."""


@dataclass(frozen=True)
class OpExplanation:
    """Why one op is what it is.

    Args:
        path: where it stands in the user's model.
        op: the canonical ops of its unit, or the name of the user's pattern.
        int8: whether it computes on codes or has a weight of integers; ``None`` where it is no op
            of the result.
        why: one sentence.
        by: the rule, override, pass or backend that decided.
        change: what would change that.
        near: rules that nearly fitted here, each with what was missing.
        made: what was done to it, as ``pass: rule (line)``, in order.
        kernel: what runs it; empty before it is converted.
        source: the user's line.
        members: paths of all that became this op.
        runs: ``int8``, ``bfloat16``, ``float16``, ``stored`` (in float, with a weight of integers),
            ``float``; empty where it is no op of the result.
    """

    path: str
    op: str
    int8: bool | None
    why: str
    by: str
    change: str
    near: tuple[tuple[str, str], ...] = ()
    made: tuple[str, ...] = ()
    kernel: str = ""
    source: str = ""
    members: tuple[str, ...] = ()
    runs: str = ""

    def __str__(self) -> str:
        runs = "stored weights" if self.runs == "stored" else self.runs or "no op to quantize"
        lines = [
            f"{shown(self.path, _NAME) or '(the model)'} ({shown(self.op, _NAME)}): {runs}",
            f"  why      {shown(self.why, _SENTENCE)}",
            f"  decided  by {shown(self.by, _NAME)}",
        ]
        if self.kernel:
            lines.append(f"  runs as  {shown(self.kernel, _NAME)}")
        if self.source:
            lines.append(f"  written  {shown(self.source, _SENTENCE)}")
        others = [path for path in self.members if path != self.path]
        if others:
            lines.append(f"  with     {', '.join(shown(path, _NAME) for path in others[:_MOST])}")
        near = self.near[:_MOST]
        lines += [f"  near     {shown(r, _NAME)}: {shown(w, _SENTENCE)}" for r, w in near]
        if len(self.near) > _MOST:
            lines.append(f"  near     and {len(self.near) - _MOST} more")
        lines.append(f"  change   {shown(self.change, _SENTENCE)}")
        return "\n".join(lines)


@dataclass(frozen=True)
class Explanation:
    """Why the ops that a selector names are what they are.

    ``for op in explanation`` gives them one by one; ``str()`` is for people.

    Args:
        selector: what was asked for.
        ops: one for each op, in graph order.
        mode: the mode the model was made in.
        backend: what it runs on; empty before it is converted.
    """

    selector: str
    ops: tuple[OpExplanation, ...]
    mode: str
    backend: str = ""

    def __iter__(self) -> Iterator[OpExplanation]:
        return iter(self.ops)

    def __len__(self) -> int:
        return len(self.ops)

    def to_dict(self) -> dict[str, Any]:
        """The same in plain types that JSON can hold; the keys are stable."""
        return {
            "selector": self.selector,
            "mode": self.mode,
            "backend": self.backend,
            "ops": [
                dataclasses.asdict(op) | {"near": [list(pair) for pair in op.near]}
                for op in self.ops
            ],
        }

    def __str__(self) -> str:
        stage = "" if self.backend else "prepared, not converted yet: this is what is planned\n"
        return stage + "\n".join(str(op) for op in self.ops)
