"""GGUF files that make up one model: the parts of a language model, an image encoder, adapters.

Owns what the headers say about files that belong together. Pure: reads nothing.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from itertools import zip_longest

from daemon.artifacts import InvalidModelFile
from daemon.artifacts.gguf import GgufHeader

MAX_PARTS = 1000
_LISTED = 10  # names that an error quotes at most
_OTHER_ROLES = {"mmproj": "an image encoder", "adapter": "an adapter (LoRA)"}
_IMAGE_FACTS = (
    "projector_type",
    "image_size",
    "image_max_pixels",
    "patch_size",
    "spatial_merge_size",
    "embedding_length",
    "feed_forward_length",
)
# Engines are told the name of the first part and make up those of the others.
_PART = "-{number:05}-of-{count:05}.gguf"


def choose(
    headers: Mapping[str, GgufHeader], where: str
) -> tuple[tuple[tuple[str, str], ...], GgufHeader]:
    """Return the names and roles of the files, and the header of the model that they make up.

    The parts of the language model come first, then its image encoder, then its adapters. The
    header is that of all parts together; its metadata has the bytes of the others' weights as
    `modeld.mmproj_bytes` and `modeld.adapter_bytes`, and those of its own as `modeld.layer_bytes`,
    `modeld.embedding_bytes`, `modeld.output_bytes` and, by their type, `modeld.matrix_bytes.Q4_K`;
    there the table of tokens counts if it is the last matrix too. What an image encoder says of the
    images that it takes is under `modeld.mmproj.`. Raises InvalidModelFile, naming `where`, if
    there is no language model, or several, or one that is not whole.
    """
    named: dict[str, list[str]] = {"weights": [], "mmproj": [], "adapter": []}
    for name, header in headers.items():
        named[_role(header)].append(name)
    if not named["weights"]:
        others = listed(f"{n} is {_OTHER_ROLES[r]}" for r in _OTHER_ROLES for n in named[r])
        raise InvalidModelFile(
            f"{where} holds no language model ({others}): import the folder that has it too"
        )
    if len(named["mmproj"]) > 1:
        raise InvalidModelFile(
            f"{where} holds several image encoders: {listed(named['mmproj'])}; leave one of them"
        )
    parts = _parts(where, {name: headers[name] for name in named["weights"]})
    model = _whole([headers[name] for name in parts], parts[0])
    for name in named["adapter"]:
        _check_adapter(name, headers[name], model)
    # What a file says under our own keys is not ours.
    metadata = {key: v for key, v in model.metadata.items() if not key.startswith("modeld.")}
    metadata |= {
        "modeld.layer_bytes": list(model.layer_bytes),
        "modeld.embedding_bytes": model.embedding_bytes,
        "modeld.output_bytes": model.output_bytes,
    }
    metadata |= {f"modeld.matrix_bytes.{kind}": n for kind, n in _matrix_bytes(model).items()}
    for name in named["mmproj"]:
        metadata |= _image_facts(headers[name])
    roles = [(name, "weights") for name in parts]
    for role in _OTHER_ROLES:
        roles += [(name, role) for name in named[role]]
        if named[role]:
            size_bytes = sum(headers[name].weights_bytes for name in named[role])
            metadata[f"modeld.{role}_bytes"] = size_bytes
    return tuple(roles), replace(model, metadata=metadata)


def _matrix_bytes(model: GgufHeader) -> dict[str, int]:
    sizes = Counter(model.matrix_bytes)
    if model.embedding_bytes and not model.output_bytes:
        sizes[model.embedding_type] += model.embedding_bytes
    return dict(sizes)


def _image_facts(encoder: GgufHeader) -> dict[str, int | str]:
    """Return what decides how much encoding an image takes."""
    found: dict[str, int | str] = {}
    for name in _IMAGE_FACTS:
        for prefix in ("clip.", "clip.vision."):
            value = encoder.metadata.get(prefix + name)
            if isinstance(value, int | str):
                found[f"modeld.mmproj.{name}"] = value
    return found


def several(where: str, names: Iterable[str]) -> InvalidModelFile:
    """Return the error for a folder of several models, one name for each."""
    return InvalidModelFile(
        f"{where} holds several models: {listed(names)}; import one of them by its own path, or "
        "give each a folder of its own"
    )


def listed(names: Iterable[str]) -> str:
    """Return `names` as an error quotes them: not too many."""
    every = list(names)
    more = f" and {len(every) - _LISTED} more" if len(every) > _LISTED else ""
    return ", ".join(every[:_LISTED]) + more


def _role(header: GgufHeader) -> str:
    kind = header.metadata.get("general.type")
    if kind == "adapter":
        return "adapter"
    return "mmproj" if kind == "mmproj" or header.architecture == "clip" else "weights"


def _parts(where: str, headers: Mapping[str, GgufHeader]) -> list[str]:
    """Return the files of the one language model among `headers`, in the order of its parts."""
    models: dict[tuple[str, ...], set[str]] = {}
    for name, header in headers.items():
        models.setdefault(_names_of_parts(name, header), set()).add(name)
    if len(models) > 1:
        raise several(where, [min(names) for names in models.values()])
    ((expected, present),) = models.items()
    if missing := [name for name in expected if name not in present]:
        raise InvalidModelFile(
            f"{where} holds {len(present)} of the {len(expected)} parts of a model: put "
            f"{listed(missing)} into the same folder, and import the folder"
        )
    return list(expected)


def _names_of_parts(name: str, header: GgufHeader) -> tuple[str, ...]:
    """Return the names that the parts of this file's model must have, its own among them."""
    count = header.metadata.get("split.count", 1)
    number = header.metadata.get("split.no", 0)
    if count in (0, 1):
        return (name,)
    if type(count) is not int or type(number) is not int or not 0 <= number < count <= MAX_PARTS:
        raise InvalidModelFile(
            f"{name} is damaged: it says that it is part {number!r}, counted from 0, of {count!r}"
        )
    ending = _PART.format(number=number + 1, count=count)
    if not name.endswith(ending):
        raise InvalidModelFile(
            f"{name} is part {number + 1} of {count}, and engines find the parts by their names: "
            f"rename it so that it ends in {ending}"
        )
    stem = name.removesuffix(ending)
    return tuple(stem + _PART.format(number=n, count=count) for n in range(1, count + 1))


def _whole(headers: Sequence[GgufHeader], first: str) -> GgufHeader:
    """Return the header of all parts together; the first has the model's metadata."""
    if len(headers) == 1:
        return headers[0]
    tensor_count = sum(header.tensor_count for header in headers)
    promised = headers[0].metadata.get("split.tensors.count", tensor_count)
    if promised != tensor_count:
        raise InvalidModelFile(
            f"{first} is for a model of {promised} tensors, and its {len(headers)} parts have "
            f"{tensor_count}: they are not of one model"
        )
    quantizations = [h.quantization for h in headers if h.quantization != "unknown"]
    return replace(
        headers[0],
        parameters=sum(header.parameters for header in headers),
        weights_bytes=sum(header.weights_bytes for header in headers),
        quantization=quantizations[0] if quantizations else "unknown",
        tensor_count=tensor_count,
        layer_bytes=tuple(
            map(sum, zip_longest(*(header.layer_bytes for header in headers), fillvalue=0))
        ),
        embedding_bytes=sum(header.embedding_bytes for header in headers),
        output_bytes=sum(header.output_bytes for header in headers),
        matrix_bytes=dict(sum((Counter(header.matrix_bytes) for header in headers), Counter())),
        embedding_type=next((h.embedding_type for h in headers if h.embedding_type), ""),
    )


def _check_adapter(name: str, adapter: GgufHeader, model: GgufHeader) -> None:
    kind = adapter.metadata.get("adapter.type")
    if kind != "lora":
        raise InvalidModelFile(f"{name} is an adapter of type {kind!r}: only lora is known")
    if adapter.architecture != model.architecture:
        raise InvalidModelFile(
            f"{name} is an adapter for {adapter.architecture!r} models, and this model is "
            f"{model.architecture!r}: move it out of the folder"
        )
