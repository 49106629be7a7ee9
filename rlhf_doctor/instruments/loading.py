"""Load a checkpoint folder as the model that its files say it is: offline, quietly, without running code from it."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rlhf_doctor.facts import Broken, Unavailable, role_fact
from rlhf_doctor.finding import Role, Stage
from rlhf_doctor.instruments.headers import base_folder, read_checkpoint
from rlhf_doctor.instruments.manifest import SCALAR_HEADS, heads_of
from rlhf_doctor.instruments.pickles import read_pickle, said_of
from rlhf_doctor.instruments.readings import Head, Loading, Manifest, TensorInfo

if TYPE_CHECKING:
    import torch

    from rlhf_doctor.examine import Options
    from rlhf_doctor.instruments.models import Models
    from rlhf_doctor.setups import RLHFSetup

__all__ = ["load_model", "loading", "quiet"]

DEEPSPEED_CHAT = "rwtransformer."
NOTE = "_loading"  # where a model that was loaded here keeps what happened
CLASSIFIERS = {
    "ForSequenceClassification": "AutoModelForSequenceClassification",
    "ForTokenClassification": "AutoModelForTokenClassification",
}
LANGUAGE_MODELS = ("AutoModelForCausalLM", "AutoModelForSeq2SeqLM")


@role_fact(Stage.PROBE)
def loading(role: str, models: Models) -> Loading:
    """What the checkpoint of a role lacked, or had too much of, when it was loaded.

    Raises:
        Unavailable: the role is an object in memory.
    """
    live = models.get(role)  # type: ignore[arg-type]  # a role fact is only measured for model roles
    found = live.model.__dict__.get(NOTE) if live.loaded_here else None
    if not isinstance(found, Loading):
        raise Unavailable(f"needs the {role} as a checkpoint folder")
    return found


def load_model(role: Role, path: Path, setup: RLHFSetup, options: Options) -> torch.nn.Module:
    """The model of a checkpoint folder, in eval mode, on ``options.device``, in ``options.dtype`` or its own.

    A policy or reference is a language model. A reward or value is the classifier that config.json names; or a
    backbone with the scalar head that its tensors name (TRL, LLaMA-Factory, OpenRLHF, DeepSpeed-Chat); or, without
    any head, a classifier of one label whose head is new and random: ``loading`` says so.

    Raises:
        Broken: it cannot be loaded, in one sentence.
    """
    manifest = read_checkpoint(role, path)
    if manifest.unloadable:
        raise Broken(role, manifest.unloadable)
    with quiet():
        try:
            source = _source(role, Path(path), manifest, setup, options)
            model, info = _adapted(source) if manifest.adapter is not None else _whole(source)
            model = model.to(options.device)
        except (Broken, KeyboardInterrupt):
            raise
        except MemoryError as error:
            raise Broken(role, f"{role}: there is not enough memory to load {path}") from error
        except (Exception, SystemExit) as error:  # the libraries raise anything, and a checkpoint's own code too
            raise Broken(role, f"{role}: {path} cannot be loaded: {said_of(error)}") from error
    model.__dict__[NOTE] = info
    return model.eval()


@contextmanager
def quiet() -> Iterator[None]:
    """No progress bar, warning or log line of the libraries inside; their settings as before afterwards."""
    from transformers.utils import logging

    level, bar = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity(logging.CRITICAL)
    logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.set_verbosity(level)
        if bar:
            logging.enable_progress_bar()


@dataclass(frozen=True)
class Source:
    """A checkpoint folder and what is known of it. ``state`` holds the tensors of its pickles."""

    role: Role
    path: Path
    manifest: Manifest
    config: Any
    tensors: Mapping[str, TensorInfo]
    how: Mapping[str, Any]
    state: Mapping[str, Any] = field(default_factory=dict)

    @property
    def heads(self) -> tuple[Head, ...]:
        """The output heads among all tensors, an adapter's own included."""
        return tuple(head for head in heads_of(self.tensors) if head.kind != "vocabulary")


def _source(role: Role, path: Path, manifest: Manifest, setup: RLHFSetup, options: Options) -> Source:
    import transformers

    trusted = bool(setup.trust_remote_code)
    if manifest.needs_remote_code and not trusted and manifest.model_type not in transformers.CONFIG_MAPPING:
        raise Broken(
            role,
            f"{role}: {path} can only be built by Python code that it brings along (auto_map in its config), "
            "and such code is run only with --trust-remote-code",
        )
    state = {n: t for file in manifest.pickles for n, t in read_pickle(role, _place(path, manifest, file)).items()}
    own = {n: TensorInfo(tuple(t.shape), str(t.dtype), "") for n, t in state.items()}
    how = {"local_files_only": True, "trust_remote_code": trusted}
    where = base_folder(manifest.adapter) if manifest.adapter is not None else path
    if where is None:
        name = (manifest.adapter or {}).get("base_model_name_or_path")
        raise Broken(role, f"{role}: the adapter in {path} sits on {name!r}, which is no folder on this machine")
    return Source(
        role=role,
        path=path,
        manifest=manifest,
        config=transformers.AutoConfig.from_pretrained(str(where), **how),
        tensors={**manifest.tensors, **manifest.adapter_tensors, **own},
        how={**how, "dtype": options.dtype or "auto"},
        state=state,
    )


def _place(path: Path, manifest: Manifest, file: str) -> Path:
    base = base_folder(manifest.adapter or {})
    return path / file if (path / file).exists() or base is None else base / file


def _whole(source: Source) -> tuple[torch.nn.Module, Loading]:
    import transformers

    name = _auto_class(source)
    if name == "":
        return _with_own_head(source)
    labels = {"num_labels": 1} if _gets_a_new_head(source, name) else {}
    model, report = _built(source, getattr(transformers, name), str(source.path), **source.how, **labels)
    return model, _report(report, type(model).__name__)


def _gets_a_new_head(source: Source, name: str) -> bool:
    """Whether a classifier is made of a language model or a backbone: loops that do so ask for one label."""
    told = source.manifest.config
    named = any(str(a).endswith(tuple(CLASSIFIERS)) for a in source.manifest.architectures)
    return name in CLASSIFIERS.values() and not named and "id2label" not in told and "num_labels" not in told


def _built(source: Source, auto: Any, where: str | None, **more: Any) -> tuple[Any, Mapping[str, Any]]:
    """(the model, what happened to which parameter), built by a class of transformers.

    Raises:
        Broken: a tensor has another shape than the model that the config describes.
    """
    # Mismatches are let through to be named below: transformers itself only prints them.
    model, report = auto.from_pretrained(where, output_loading_info=True, ignore_mismatched_sizes=True, **more)
    for name, held, wanted in sorted(report.get("mismatched_keys") or (), key=str):
        hint = ""
        if any(head.name == name for head in source.heads) and "id2label" not in source.manifest.config:
            hint = f"; config.json names no labels (id2label), from which transformers takes {wanted[0]}"
        raise Broken(
            source.role,
            f"{source.role}: {name!r} in {source.path} has shape {tuple(held)}, and {tuple(wanted)} in the "
            f"{type(model).__name__} that its config.json describes{hint}",
        )
    return model, report


def _auto_class(source: Source) -> str:
    """The class to load a checkpoint with; "" for a backbone with a head that no class of transformers has."""
    import transformers

    named = [a for a in source.manifest.architectures if isinstance(a, str)]
    own = source.config.to_dict().get("auto_map") or {}
    if source.role in ("policy", "reference"):
        wanted = LANGUAGE_MODELS[1] if getattr(source.config, "is_encoder_decoder", False) else LANGUAGE_MODELS[0]
        return wanted if not own or wanted in own or source.how["trust_remote_code"] is False else next(iter(own))
    for ending, auto in CLASSIFIERS.items():
        if any(a.endswith(ending) for a in named):
            return auto
    if source.how["trust_remote_code"]:
        written = [key for key in own if key.startswith("AutoModel") and key not in LANGUAGE_MODELS]
        if written:
            return str(written[0])
    if source.heads:
        return ""
    tokens = transformers.models.auto.modeling_auto.MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING
    per_token = source.role == "value" and type(source.config) in tokens
    return CLASSIFIERS["ForTokenClassification" if per_token else "ForSequenceClassification"]


def _with_own_head(source: Source) -> tuple[torch.nn.Module, Loading]:
    """A backbone with the head that the tensors name."""
    import transformers

    below = {n.removeprefix(DEEPSPEED_CHAT): t for n, t in source.state.items() if n.startswith(DEEPSPEED_CHAT)}
    if below:
        base = transformers.AutoModel._model_mapping[type(source.config)]
        more = {"config": source.config, "state_dict": below, "dtype": source.how["dtype"]}
        model, report = _built(source, base, None, **more)
    else:
        model, report = _built(source, transformers.AutoModel, str(source.path), **source.how)
    return _wrapped(source, model, report)


def _wrapped(source: Source, backbone: Any, report: Mapping[str, Any]) -> tuple[torch.nn.Module, Loading]:
    from rlhf_doctor.scalar_head import BackboneWithScalarHead, build_head

    group = _head_group(source.heads[0].name)
    names = [name for name in source.tensors if name.startswith(f"{group}.")]
    head = build_head({name.removeprefix(f"{group}."): _tensor(source, name) for name in names})
    if head is None:
        raise Broken(source.role, f"{source.role}: {source.path} has a head {group!r} of a layout that is not known")
    floating = next(backbone.parameters()).dtype
    config = source.manifest.config
    scaled = source.role == "reward" and config.get("normalize_reward") is True
    model = BackboneWithScalarHead(
        backbone,
        head.to(floating),
        group.rpartition(".")[2],
        per_token=source.role == "value",
        mean=_number(config.get("mean"), 0.0) if scaled else 0.0,
        std=_number(config.get("std"), 1.0) if scaled else 1.0,
    )
    info = _report(report, f"{type(backbone).__name__} with the checkpoint's own head {group!r}", names)
    return model, info


def _number(value: Any, otherwise: float) -> float:
    return float(value) if isinstance(value, (int, float)) and value else otherwise


def _head_group(name: str) -> str:
    """``v_head`` of ``v_head.summary.weight``."""
    parts = name.split(".")
    at = next((i for i, p in enumerate(parts[:-1]) if p in SCALAR_HEADS or p.endswith("_head")), len(parts) - 2)
    return ".".join(parts[: at + 1])


def _tensor(source: Source, name: str) -> torch.Tensor:
    from safetensors import safe_open

    if name in source.state:
        held: torch.Tensor = source.state[name]
        return held
    with safe_open(source.path / source.tensors[name].file, framework="pt") as file:
        tensor: torch.Tensor = file.get_tensor(name)
        return tensor


def _adapted(source: Source) -> tuple[torch.nn.Module, Loading]:
    """The base with the adapter in it, nothing trainable."""
    import peft
    import transformers

    base = base_folder(source.manifest.adapter or {})
    task = (source.manifest.adapter or {}).get("task_type")
    own = [h for h in source.heads if h.name in source.manifest.adapter_tensors or h.name in source.state]
    language = source.role in ("policy", "reference") or (task not in ("SEQ_CLS", "TOKEN_CLS") and bool(own))
    labels: dict[str, Any] = {}
    if language:
        auto = LANGUAGE_MODELS[1] if getattr(source.config, "is_encoder_decoder", False) else LANGUAGE_MODELS[0]
    else:
        auto = CLASSIFIERS["ForTokenClassification" if task == "TOKEN_CLS" else "ForSequenceClassification"]
        # The number of labels is nowhere in an adapter's config; its own head has it.
        labels = {"num_labels": own[0].width} if own else {}
    model, report = _built(source, getattr(transformers, auto), str(base), **source.how, **labels)
    config = peft.PeftConfig.from_pretrained(str(source.path))
    config.inference_mode = True
    adapted = peft.get_peft_model(model, config)
    held = {n: _tensor(source, n) for n in (source.manifest.adapter_tensors or source.state)}
    own_values = peft.get_peft_model_state_dict(adapted)
    lost = sorted(own_values.keys() - held.keys())
    # What the adapter should have and has not keeps its fresh value: it is named, and the rest can be examined.
    result = peft.set_peft_model_state_dict(adapted, {**{n: own_values[n] for n in lost}, **held})
    kept = [n for n in report.get("missing_keys") or () if not any(head.name.endswith(n) for head in own)]
    unused = [n for n in result.unexpected_keys if not any(n.startswith(_head_group(h.name)) for h in own)]
    info = Loading((*sorted(kept), *lost), tuple(unused), f"{type(model).__name__} with an adapter")
    if language and own and source.role not in ("policy", "reference"):
        wrapped, _ = _wrapped(source, adapted.get_base_model().base_model, report)
        return wrapped, info
    return adapted, info


def _report(report: Mapping[str, Any], built: str, taken: list[str] | None = None) -> Loading:
    unexpected = sorted(set(map(str, report.get("unexpected_keys") or ())) - set(taken or ()))
    return Loading(tuple(sorted(map(str, report.get("missing_keys") or ()))), tuple(unexpected), built)
