"""The code on the pages of the documentation: what is marked runnable is run, as it stands.

A comment before a fence says what becomes of the block, and is invisible where the page is read:

    <!-- runnable -->            run by test_docs.py; the blocks of a page share one namespace and one folder, in order
    <!-- runnable slow -->       the same among the slow tests
    <!-- runnable                with text that is replaced first, so that it takes seconds: one `old => new` a line
    max_steps=100 => max_steps=2
    -->
    <!-- output -->              what the block before it prints, compared by lines; `...` stands for any lines
    <!-- needs a GPU -->         not run; the site shows the words as the block's title

and ``<!-- given out -->`` at a page's top puts a compressed model into ``out`` before the first block. Shell blocks are
run by bash, but for the package's own commands, which are called in the process.

As a program it is a server: it imports torch once, and forks for each page that is asked for on its standard input.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
import shlex
import subprocess
import sys
import traceback
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
CODE = {"python", "sh", "yaml"}
PROSE = {"", "text"}  # formulas and output

_FENCE = re.compile(
    r"^(?:<!-- (?P<mark>[^>]*(?:=>[^>]*)*)-->\n)?```(?P<language>\w*)\n(?P<code>.*?)^```[ ]*$", re.M | re.S
)


@dataclass(frozen=True)
class Block:
    """One fenced block of a page."""

    line: int
    """Of the page, where the code begins."""
    language: str
    mark: str
    """First line of the comment before it: ``runnable``, ``runnable slow``, ``output``, ``needs ...`` or nothing."""
    code: str
    smaller: tuple[tuple[str, str], ...] = field(default=())

    @property
    def runnable(self) -> bool:
        return self.mark in ("runnable", "runnable slow")

    def as_run(self) -> str:
        """The code with its replacements; each must be there to be replaced."""
        code = self.code
        for old, new in self.smaller:
            if old not in code:
                raise ValueError(f"line {self.line}: the block has no {old!r} to replace")
            code = code.replace(old, new)
        return code


def blocks_of(text: str) -> list[Block]:
    """Every fenced block of a page, in order."""
    found = []
    for fence in _FENCE.finditer(text):
        mark, _, rest = (fence["mark"] or "").strip().partition("\n")
        pairs = [tuple(part.strip() for part in line.split("=>")) for line in rest.splitlines() if line.strip()]
        line = text.count("\n", 0, fence.start("code")) + 1
        found.append(Block(line, fence["language"], mark.strip(), fence["code"], tuple((a, b) for a, b in pairs)))
    return found


def pages() -> dict[str, Path]:
    """README.md and every page of docs/, by path in the repository."""
    found = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
    return {path.relative_to(ROOT).as_posix(): path for path in found}


def require_output(expected: str, printed: str, where: str) -> None:
    """Raise unless the expected lines were printed, in order and without a gap but where ``...`` stands."""
    lines = [line.rstrip() for line in printed.splitlines()]
    begin = 0
    for part in re.split(r"^\.\.\.\n", expected, flags=re.M):
        wanted = [line.rstrip() for line in part.strip("\n").splitlines()]
        places = [n for n in range(begin, len(lines)) if lines[n : n + len(wanted)] == wanted]
        if not places:
            raise AssertionError(f"{where}: not printed:\n{part}\nprinted:\n{printed}")
        begin = places[0] + len(wanted)


def run_page(name: str, slow: bool) -> None:
    """Run the blocks of one page in the current folder; with ``slow`` also those of the slow tests."""
    page = pages()[name]
    namespace: dict[str, object] = {"__name__": "__main__"}
    printed = ""
    for block in blocks_of(page.read_text(encoding="utf-8")):
        where = f"{name}:{block.line}"
        if block.runnable and (slow or block.mark == "runnable"):
            print(f"--- {where}", flush=True)
            printed = _run(block, where, namespace)
        elif block.runnable:
            printed = ""
        elif block.mark == "output" and printed:
            require_output(block.code, printed, where)


def _run(block: Block, where: str, namespace: dict[str, object]) -> str:
    with contextlib.redirect_stdout(io.StringIO()) as out:
        try:
            if block.language == "python":
                exec(compile("\n" * (block.line - 1) + block.as_run(), where, "exec"), namespace)
            elif block.language == "sh":
                _shell(block.as_run())
            elif block.language == "yaml":  # a file: its name stands in its first line, `# NAME.yaml`
                file = Path(block.code.partition("\n")[0].removeprefix("#").strip())
                file.write_text(block.as_run(), encoding="utf-8")
        finally:
            print(out.getvalue(), file=sys.__stdout__, flush=True)
    return out.getvalue()


def _shell(script: str) -> None:
    from lowrank_lit import cli

    own = {"lowrank-lit": cli.main, "lightning": cli.lightning_main}
    for line in script.replace("\\\n", " ").splitlines():
        words = shlex.split(line, comments=True)
        if words and words[0] in own:
            file = words.pop() if words[-2:-1] == [">"] else None
            with contextlib.redirect_stdout(io.StringIO()) as out:
                code = own[words[0]]([word for word in words[1:] if word != ">"])
            if code:
                raise AssertionError(f"exit code {code}: {line}")
            if file is None:
                print(out.getvalue(), end="")
            else:
                Path(file).write_text(out.getvalue(), encoding="utf-8")
        elif words:
            done = subprocess.run(["bash", "-ec", line], check=True, stdout=subprocess.PIPE, text=True)
            print(done.stdout, end="")


def make_given(folder: Path) -> None:
    """The model that pages begin with: the embedded one, compressed quickly, with ranks for 4 bits."""
    import lowrank_lit

    module = lowrank_lit.LowRankModule("recipes/quickstart/model")
    module.configure_model()
    data = lowrank_lit.TextDataModule(
        {"calibration": "embedded:calibration"}, "recipes/quickstart/model", calibration_blocks=4
    )
    result = lowrank_lit.compress(
        module.model, data.calibration_batches(), keep_ratio=0.6, preset="unirank", quantum=64, min_rank=64
    )
    lowrank_lit.export(module.model, result.plan, folder, tokenizer=data.tokenizer, dtype="bfloat16")


def serve() -> None:
    """Fork for every request, a line of JSON with folder, output, and page or given; answer the exit status."""
    import lightning.pytorch  # noqa: F401
    import peft  # noqa: F401
    import transformers.models.llama.modeling_llama  # noqa: F401

    import lowrank_lit.callbacks
    import lowrank_lit.cli

    assert Path(lowrank_lit.__file__).is_relative_to(ROOT), lowrank_lit.__file__
    for line in sys.stdin:
        request = json.loads(line)
        child = os.fork()
        if child == 0:
            os._exit(_answer(request))
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)


def _answer(request: dict[str, str]) -> int:
    out = os.open(request["output"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(out, 1)
    os.dup2(out, 2)
    try:
        os.chdir(request["folder"])
        if "given" in request:
            make_given(Path(request["given"]))
        else:
            run_page(request["page"], bool(request.get("slow")))
    except BaseException:
        traceback.print_exc()
        return 1
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
    return 0


if __name__ == "__main__":
    serve()
