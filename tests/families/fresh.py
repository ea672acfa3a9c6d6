"""Load written checkpoints where this project cannot be imported, and generate. One JSON line a folder.

python fresh.py FOLDER ...
"""

from __future__ import annotations

import json
import sys
import warnings
from importlib.abc import MetaPathFinder
from pathlib import Path
from typing import Any


class Blocked(MetaPathFinder):
    def find_spec(self, fullname: str, path: Any, target: Any = None) -> None:
        if fullname.split(".")[0] == "blockpruner":
            raise ImportError(fullname)


def brief(error: BaseException) -> str:
    lines = [line for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {(lines or [''])[0][:200]}"


def cache_is_off_by(model: Any, common: dict[str, Any]) -> float:
    """Return the largest difference of logits in a generation with and without a cache, in standard deviations. Only
    steps that follow the same tokens count: of two logits that are as large, either may be chosen."""
    more = {"return_dict_in_generate": True, "output_logits": True}
    plain, cached = (model.generate(**common, **more, use_cache=use_cache) for use_cache in (False, True))
    worst = 0.0
    for row in range(len(common["input_ids"])):
        for one, other in zip(plain.logits, cached.logits, strict=True):
            difference = (one[row] - other[row]).abs().max() / one[row].std()
            worst = max(worst, difference.item())
            if one[row].argmax() != other[row].argmax():
                break
    return worst


def look_at(folder: Path) -> dict[str, Any]:
    import torch
    from transformers import AutoModelForCausalLM

    model, info = AutoModelForCausalLM.from_pretrained(
        folder, trust_remote_code=True, dtype=torch.float32, output_loading_info=True
    )
    model.eval()
    found: dict[str, Any] = {"missing": len(info["missing_keys"]), "unexpected": len(info["unexpected_keys"])}
    if (folder / "expected.pt").exists():
        saved = torch.load(folder / "expected.pt")
        with torch.inference_mode():
            logits = model(input_ids=saved["windows"], use_cache=False).logits
        found["off"] = ((logits - saved["logits"]).abs().max() / saved["logits"].abs().max()).item()
    ids = torch.tensor([[0, 0, 0, 117, 33, 250, 41], [91, 122, 45, 70, 381, 55, 60]])
    for name, batch in (("padded", ids), ("unpadded", ids[:, 3:].contiguous())):
        common = {
            "input_ids": batch, "attention_mask": (batch != 0).long(), "max_new_tokens": 10, "min_new_tokens": 10,
            "do_sample": False, "pad_token_id": 0, "eos_token_id": 2,
        }  # fmt: skip
        try:
            found[name] = cache_is_off_by(model, common)
        except Exception as error:
            found[name] = brief(error)
    with torch.inference_mode():
        mask = (ids != 0).long()
        places = (mask.cumsum(-1) - 1).clamp(min=0)
        try:
            alone = model(input_ids=ids[:1, 3:], use_cache=False).logits[0, -1]
            padded = model(input_ids=ids, attention_mask=mask, position_ids=places, use_cache=False).logits[0, -1]
            found["padding_off"] = ((alone - padded).abs().max() / alone.abs().max()).item()
        except Exception as error:
            found["padding_off"] = brief(error)
    return found


def main() -> None:
    sys.meta_path.insert(0, Blocked())
    warnings.filterwarnings("ignore")
    import torch

    torch.set_num_threads(1)
    for folder in sys.argv[1:]:
        try:
            found = look_at(Path(folder))
        except Exception as error:
            found = {"error": brief(error)}
        print("FOUND " + json.dumps({"folder": folder, **found}), flush=True)


if __name__ == "__main__":
    main()
