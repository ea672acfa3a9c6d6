"""Check every decoder type of transformers that can be built tiny, and write which are right.

    python -m tests.families [--write] [NAME ...]

NAME: families (a model_type, or a variant in configs.py). Ends with code 1 if one is wrong or gives a traceback.
--write: also write the table in docs/families.md.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import warnings
from pathlib import Path
from typing import Any

DOCUMENT = Path(__file__).parents[2] / "docs" / "families.md"
BATCH = 20
"""Families whose checkpoints one fresh process looks at: to start one takes as long as a family."""
CACHE = 1e-3
"""Standard deviations by which logits with a cache may differ from those without. Rounding is a hundredth of it."""
STATES = ("right", "refused", "wrong", "traceback", "not testable")
HEAD = """# Families

Made by `make families` with transformers {version}. Each type is built tiny with random weights and taken through the
check at loading, forked scores of single and combined masks against the model's own forward with hooks (resident and
streamed), pruning, and checkpoints that are loaded and generate in a process without this project, with and without a
cache, for a left-padded batch. Types with other parts beside their decoder (vision, audio) are not in it.

"""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*")
    parser.add_argument("--write", action="store_true")
    arguments = parser.parse_args()
    os.environ["HF_HUB_OFFLINE"] = "1"
    warnings.filterwarnings("ignore")
    import torch
    from transformers.utils import logging

    from tests.families.checking import Found, check_family
    from tests.families.configs import all_names, has_parts

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as work:
        os.environ["BLOCKPRUNER_CACHE"] = str(Path(work) / "cache")
        rows: list[Found] = []
        names = arguments.names or [name for name in all_names() if not has_parts(name)]
        for batch in (names[start : start + BATCH] for start in range(0, len(names), BATCH)):
            some = [check_family(name, Path(work)) for name in batch]
            found = generations([folder for row in some for folder in row.folders], Path(work))
            for row in some:
                if row.state == "right":
                    judge(row, found)
                print(f"{row.family}: {row.state} {row.why} {'; '.join(row.notes)}", flush=True)
            rows += some
    counts = {state: sum(row.state == state for row in rows) for state in STATES}
    print(json.dumps(counts))
    if arguments.write:
        DOCUMENT.write_text(table(rows, counts), encoding="utf-8")
    return int(bool(counts["wrong"] or counts["traceback"]))


def generations(folders: list[Path], work: Path) -> dict[str, dict[str, Any]]:
    environment = {**os.environ, "HF_MODULES_CACHE": str(work / "modules"), "PYTHONPATH": ""}
    program = [sys.executable, str(Path(__file__).parent / "fresh.py"), *map(str, folders)]
    done = subprocess.run(program, cwd=work, env=environment, capture_output=True, text=True, check=False)
    lines = [json.loads(line.removeprefix("FOUND ")) for line in done.stdout.splitlines() if line.startswith("FOUND ")]
    for folder in folders:
        shutil.rmtree(folder, ignore_errors=True)
    return {line["folder"]: line for line in lines}


def judge(row: Any, found: dict[str, dict[str, Any]]) -> None:
    dense = found.get(str(row.folders[0]), {})
    for folder in row.folders[1:]:
        seen = found.get(str(folder), {"error": "the process died"})
        if "error" in seen or seen["missing"] or seen["unexpected"]:
            row.ends("wrong", f"a checkpoint does not load: {seen.get('error') or seen}")
        elif not seen["off"] < 1e-4:
            row.ends("wrong", f"a checkpoint gives other logits: off by {seen['off']:.1e}")
        off = dense.get("padding_off")
        minds_padding = not isinstance(off, float) or off > 1e-3
        for which in ("padded", "unpadded"):
            of_dense, of_pruned = dense.get(which), seen.get(which)
            if isinstance(of_pruned, float) and of_pruned < CACHE:
                continue
            if which == "padded" and minds_padding:
                note = "padding alone changes what the dense model says"
            elif not isinstance(of_dense, float) or of_dense >= CACHE:
                note = f"the dense model, too, gives other logits with its cache ({which})"
            else:
                row.ends("wrong", f"with a cache it gives other logits ({which}): {of_pruned} against {of_dense}")
                continue
            if note not in row.notes:
                row.notes.append(note)


def table(rows: list[Any], counts: dict[str, int]) -> str:
    import transformers

    lines = [", ".join(f"{number} {state}" for state, number in counts.items() if number) + ".", ""]
    for state in STATES:
        some = [row for row in rows if row.state == state]
        if not some:
            continue
        lines += [f"## {state.capitalize()}", ""]
        if state == "right":
            lines += ["| family | mixers | note |", "| --- | --- | --- |"]
            lines += [f"| {row.family} | {row.mixers} | {'; '.join(row.notes)} |" for row in some]
        else:
            lines += ["| family | why |", "| --- | --- |"]
            lines += [f"| {row.family} | {row.why.replace('|', '/')[:260]} |" for row in some]
        lines.append("")
    return HEAD.format(version=transformers.__version__) + "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
