"""The text of the modelling file of a pruned model, generated from a template."""

from __future__ import annotations

import importlib.resources
import inspect
from collections.abc import Iterable
from string import Template
from typing import Any

from transformers import PreTrainedConfig, PreTrainedModel
from transformers.conversion_mapping import get_checkpoint_conversion_mapping

from blockpruner.engine.blocks import Kind
from blockpruner.engine.model.architectures import PRUNED_PREFIX
from blockpruner.engine.model.narrowing import find_narrow
from blockpruner.engine.model.rows import Architecture

REQUIREMENT = """
import transformers

if int(transformers.__version__.split(".")[0]) < 5:
    raise ImportError("this checkpoint needs transformers 5: transformers 4 has other names for its weights")
"""


WIDEN = """\
        self.source_config = as_source(config)
        with torch.device("meta"):
            source = {base}(self.source_config)
        for name in BY_LAYER:
            self.set_submodule(name, source.get_submodule(name).to_empty(device=self.device))
"""
METHOD = """
    def {name}(self, *args, **kwargs):
        return {base}.{name}(AsSource(self), *args, **kwargs)
"""
LAST_METHOD = """
    def {name}(self, *args, **kwargs):
        values = {base}.{name}(AsSource(self), *args, **kwargs)  # [sequences, tokens, source layers, ...]
        # The model takes values by the number of a layer; here every layer gets those of all source layers.
        return values.unsqueeze(2).expand(-1, -1, self.config.num_hidden_layers, *values.shape[2:])
"""
AS_SOURCE = """

class AsSource:
    \"\"\"A model whose config says how many layers the source model has.\"\"\"

    def __init__(self, model):
        self.model = model
        self.config = model.source_config

    def __getattr__(self, name):
        return getattr(self.model, name)
"""


def modelling_source(
    model: PreTrainedModel, architecture: Architecture, *, is_remote: bool = False, is_narrower: bool = False
) -> str:
    """Return the text of the modelling file for models like this one."""
    layer_classes = [type(layer) for layer in model.get_submodule(architecture.layers)]
    if len(set(layer_classes)) == 1:
        layer_classes = layer_classes[:1]
    base, _, layers = architecture.layers.partition(".")
    base_class = type(model.get_submodule(base))
    classes = [type(model.config), type(model), base_class, *layer_classes]
    inline = architecture.inline_mlp or ()
    by_layer = architecture.by_layer_of(model)
    return _template("modeling_grouped").substitute(
        model_type=model.config.model_type,
        imports="\n".join(_imports(classes, is_remote))
        + (REQUIREMENT if names_differ_in_transformers_4(model) else ""),
        config_class=type(model.config).__name__,
        config_properties=_config_properties(model.config),
        causal_class=type(model).__name__,
        base_class=base_class.__name__,
        layer_classes=", ".join(layer_class.__name__ for layer_class in layer_classes),
        layer_arguments=list(architecture.layer_arguments),
        base=base,
        layers=layers,
        modules={"mixer": list(architecture.mixers), "mlp": list(inline[1:] or architecture.mlps)},
        with_them={"mixer": list(architecture.mixer_norms), "mlp": [*inline[:1], *architecture.mlp_norms]},
        residual_in=[{Kind.MHA: "mixer", Kind.MLP: "mlp"}[kind] for kind in sorted(architecture.residual_in)],
        only_mlp=sorted(architecture.only_mlp),
        by_token=list(architecture.by_token if by_layer else ()),
        by_layer=by_layer,
        widen=WIDEN.format(base=base_class.__name__) if by_layer else "",
        methods=_methods(architecture, base_class.__name__) if by_layer else "",
        **_narrower(model.get_submodule(architecture.layers), architecture, is_narrower=is_narrower),
    )


def _methods(architecture: Architecture, base: str) -> str:
    *others, last = architecture.by_layer_methods
    return "".join(
        [*(METHOD.format(base=base, name=name) for name in others), LAST_METHOD.format(base=base, name=last), AS_SOURCE]
    )


def _template(name: str) -> Template:
    file = importlib.resources.files("blockpruner.engine.model.classes").joinpath(f"{name}.template")
    return Template(file.read_text(encoding="utf-8"))


def _narrower(layers: Any, architecture: Architecture, *, is_narrower: bool) -> dict[str, str]:
    """Return the parts of the modelling file that are only there if blocks lack some of their groups."""
    if not is_narrower:
        return {"widths": "", "narrower": "", "narrow_layer": ""}
    linears: dict[str, list[Any]] = {}
    for name, kind, known in (
        ("mixer", Kind.MHA, architecture.head_linears), ("mlp", Kind.MLP, architecture.mlp_linears),
    ):  # fmt: skip
        used = {one.linears for layer in layers if (one := find_narrow(architecture, layer, kind)) is not None}
        linears[name] = [[list(one.inward), one.outward] for one in known if one in used]
    return {
        "widths": '''
    mlp_widths: dict | None = None
    """Numbers of channels of those MLPs that have fewer than in the source model, by source layer."""
    kept_kv_heads: dict | None = None
    """Numbers of KV heads of those attentions that have fewer than in the source model, by source layer."""''',
        "narrower": "\n" + _template("narrower").substitute(linears=linears).rstrip("\n"),
        "narrow_layer": "\n    narrow(layer, config, index)",
    }


def _config_properties(config: PreTrainedConfig) -> str:
    """Return the source of per-layer lists that the config computes from the number of layers: the pruned config has
    them for the layers of its model."""
    names = [
        name
        for name, value in inspect.getmembers(type(config), lambda value: isinstance(value, property))
        if "layer" in name and _is_per_layer(getattr(config, name), config.num_hidden_layers)
    ]
    return "".join(
        f"""
    @property
    def {name}(self):
        if self.block_groups is None or self.num_hidden_layers == self.source_num_hidden_layers:
            return super().{name}
        source = copy.copy(self)
        source.num_hidden_layers = self.source_num_hidden_layers
        return [source.{name}[group["attention"]] for group in self.block_groups]
"""
        for name in names
    )


def _is_per_layer(value: Any, num_layers: int) -> bool:
    return isinstance(value, list) and len(value) == num_layers


def names_differ_in_transformers_4(model: PreTrainedModel) -> bool:
    """Whether transformers 4 has other names for a dense or pruned model's weights. It would fill in random numbers for
    them."""
    kinds = (type(model).__name__, type(model.base_model).__name__, model.config.model_type)
    names = (kind.removeprefix("BlockPruned").removeprefix(PRUNED_PREFIX) for kind in kinds)
    return any(get_checkpoint_conversion_mapping(name) for name in names)


def _imports(classes: Iterable[type], is_remote: bool) -> list[str]:
    by_module: dict[str, set[str]] = {}
    for cls in classes:
        by_module.setdefault(cls.__module__, set()).add(cls.__name__)
    lines = []
    for module, names in sorted(by_module.items()):
        # Files that come with the model are copied next to the new file.
        where = f".{module.rpartition('.')[2]}" if is_remote and "transformers_modules" in module else module
        lines.append(f"from {where} import {', '.join(sorted(names))}")
    return lines
