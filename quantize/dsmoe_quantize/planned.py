"""What the converter and the quantizer have in common before they write: what the file says of itself, what
decides its bytes, what each weight counts. So both make the same file of the same weights.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence

import numpy as np
from gguf.constants import GGML_QUANT_VERSION, GGUFValueType
from numpy.typing import NDArray

from dsmoe_local.model.ggml import FLOATS, type_name
from dsmoe_local.model.gguf_file import Field
from dsmoe_local.model.type_name import RECIPE_KEY
from dsmoe_quantize.choose import Choice, TensorLike, fallback_notes
from dsmoe_quantize.encode import TensorJob
from dsmoe_quantize.imatrix import Imatrix, metadata_of_use
from dsmoe_quantize.recipe_file import render_recipe
from dsmoe_quantize.recipes import LayeredRecipe
from dsmoe_quantize.types import SettledType

_DROPPED = (
    "general.quantization_version",
    "general.file_type",
    "split.no",
    "split.count",
    "split.tensors.count",
    RECIPE_KEY,
)


def metadata_of_output(
    metadata: Mapping[str, Field], choice: SettledType, imatrix: Imatrix | None = None
) -> dict[str, Field]:
    """`metadata` as a file of this type has it, as llama_model_quantize writes it, and the recipe if there is
    one.

    What is said about quantization moves to the end; keys about being one of several shards, or about the
    recipe of the source, go.
    """
    kept = {key: field for key, field in metadata.items() if key not in _DROPPED}
    kept["general.quantization_version"] = Field(GGML_QUANT_VERSION, GGUFValueType.UINT32)
    kept["general.file_type"] = Field(choice.file_type, GGUFValueType.UINT32)
    if isinstance(choice, LayeredRecipe):
        kept[RECIPE_KEY] = Field(render_recipe(choice), GGUFValueType.STRING)
    return kept | (metadata_of_use(imatrix) if imatrix else {})


def identity_of_output(
    choice: SettledType, chosen: Sequence[Choice], imatrix: Imatrix | None
) -> dict[str, object]:
    """What decides the bytes besides the source, by names that a user understands: see `write_output`."""
    types = "\n".join(f"{each.name} {type_name(each.type)}" for each in chosen)
    recipe = render_recipe(choice) if isinstance(choice, LayeredRecipe) else None
    return {
        "the type": choice.name,
        "the tensors' types": hashlib.sha256(types.encode()).hexdigest(),
        "the recipe": recipe and hashlib.sha256(recipe.encode()).hexdigest(),
        "the importance matrix": imatrix and imatrix.digest(),
    }


def refuse_foreign(imatrix: Imatrix | None, tensors: Sequence[TensorLike]) -> None:
    """UsageError for an importance matrix of another model than the one of these tensors."""
    if imatrix is not None:
        for tensor in tensors:
            imatrix.importance(tensor.name, tensor.shape)


def importance_of(imatrix: Imatrix | None, tensor: TensorLike, choice: Choice) -> NDArray[np.float32] | None:
    """What the columns of a tensor count that is encoded anew; None if nobody knows, or it is not."""
    if imatrix is None or choice.type in FLOATS or choice.type is tensor.type:
        return None
    return imatrix.importance(tensor.name, tensor.shape)


def notes_on_output(
    chosen: Sequence[Choice], jobs: Sequence[TensorJob], imatrix: Imatrix | None
) -> Iterator[str]:
    """What a person should know: types that do not fit, and tensors of which a matrix says nothing, as the
    output and the embedding often.
    """
    yield from fallback_notes(chosen)
    blind = [
        job.name
        for job in jobs
        if job.importance is None and job.target not in FLOATS and job.target is not job.source.type
    ]
    if blind and imatrix is not None:
        more = f" and {len(blind) - 3} more" if len(blind) > 3 else ""
        yield f"the importance matrix says nothing of {', '.join(blind[:3])}{more}"
