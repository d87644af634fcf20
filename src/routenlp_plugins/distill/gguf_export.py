"""A model of transformers written as GGUF: the file it came from, with other weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..errors import DataError, ReleaseError
from .causal import need

__all__ = ["write_gguf"]

KINDS = ("F32", "F16", "Q8_0")


def write_gguf(model: Any, like: Path, out: Path, kind: str = "F16") -> Path:
    """Write the weights of a Llama model with the tokenizer and the settings of a GGUF file.

    Args:
        model: of transformers, without adapters.
        like: GGUF file of the same architecture and tokenizer, for example the one that `base_from_gguf` read.
        out: file to write; an existing one is never touched.
        kind: of the matrices: F32, F16 or Q8_0. Vectors are F32.

    Raises:
        DataError: the architecture is another one, a tensor is missing or of another shape, or `kind` is unknown.
        ReleaseError: there is something at `out` already.
        MissingExtraError: gguf is not installed.
    """
    need("gguf")
    import gguf

    if kind not in KINDS:
        raise DataError(f"kind must be one of {', '.join(KINDS)}, got {kind!r}")
    if out.exists():
        raise ReleaseError(f"{out}: exists already and is not overwritten; choose a new file")
    if not like.is_file():
        raise DataError(f"{like}: no such GGUF file")
    reader = gguf.GGUFReader(str(like))
    architecture = str(reader.fields["general.architecture"].contents())
    if architecture != "llama" or model.config.model_type != "llama":
        raise DataError(
            f"{like}: only Llama models are written as GGUF, got {architecture!r} and {model.config.model_type!r}"
        )
    weights = _by_gguf_name(model)
    quantization = gguf.GGMLQuantizationType[kind]
    scratch = out.with_name(f".{out.name}.new")
    writer = gguf.GGUFWriter(str(scratch), architecture)
    for field in reader.fields.values():
        if not field.name.startswith("GGUF.") and field.name not in ("general.architecture", "general.file_type"):
            inner = field.types[-1] if field.types[0] == gguf.GGUFValueType.ARRAY else None
            writer.add_key_value(field.name, field.contents(), field.types[0], inner)
    writer.add_file_type(gguf.LlamaFileType[{"F32": "ALL_F32", "F16": "MOSTLY_F16", "Q8_0": "MOSTLY_Q8_0"}[kind]])
    for tensor in reader.tensors:
        array = weights.get(tensor.name)
        # GGUF counts dimensions from the innermost
        shape = tuple(tensor.shape.tolist()[::-1])
        if array is None or array.shape != shape:
            raise DataError(
                f"{tensor.name}: expected shape {shape}, the model has {None if array is None else array.shape}"
            )
        if array.ndim == 1 or kind == "F32":
            writer.add_tensor(tensor.name, array.astype(np.float32))
        elif kind == "F16":
            writer.add_tensor(tensor.name, array.astype(np.float16))
        else:
            packed = gguf.quants.quantize(array.astype(np.float32), quantization)
            writer.add_tensor(tensor.name, packed, raw_dtype=quantization)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return scratch.replace(out)


def _by_gguf_name(model: Any) -> dict[str, NDArray[Any]]:
    import gguf

    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, model.config.num_hidden_layers)
    heads, of_keys = model.config.num_attention_heads, model.config.num_key_value_heads
    found = {}
    for name, tensor in model.state_dict().items():
        array = tensor.float().numpy()
        if name.endswith("q_proj.weight"):
            array = _interleaved(array, heads)
        elif name.endswith("k_proj.weight"):
            array = _interleaved(array, of_keys)
        known = names.get_name(name, try_suffixes=(".weight", ".bias"))
        if known is not None:
            found[known] = array
    return found


def _interleaved(weights: NDArray[Any], heads: int) -> NDArray[Any]:
    """Rows of each head in the order in which llama.cpp rotates them: pairs side by side, not in halves."""
    rows, columns = weights.shape
    halves = weights.reshape(heads, 2, rows // heads // 2, columns)
    return np.ascontiguousarray(halves.swapaxes(1, 2).reshape(rows, columns))
