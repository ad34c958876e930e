"""Import and export of Hugging Face weights, by one table of names.

Import streams each parameter from safetensors into its sharding. Export writes a directory that
`transformers`, vLLM and SGLang load.
"""

import math
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from safetensors import safe_open
from safetensors.numpy import save_file

from zerosearch_jax.errors import UserError, named_errors, shown
from zerosearch_jax.files import atomic_path, read_json, write_json
from zerosearch_jax.models.config import ModelConfig
from zerosearch_jax.models.generation_config import write_configs
from zerosearch_jax.models.transformer import abstract_model, param_shardings
from zerosearch_jax.parallel.processes import to_host

# Our name -> (Hugging Face's name, groups of our dimensions). Each group lists the dimensions,
# without the layer axis, that one Hugging Face dimension flattens, outermost first. For example,
# q is [D, N, H] here and [N * H, D] there, so its groups are ((1, 2), (0,)).
NAMES: dict[str, tuple[str, tuple[tuple[int, ...], ...]]] = {
    "embedding": ("model.embed_tokens.weight", ((0,), (1,))),
    "final_norm": ("model.norm.weight", ((0,),)),
    "unembed": ("lm_head.weight", ((1,), (0,))),
    "layers.attn_norm": ("model.layers.{}.input_layernorm.weight", ((0,),)),
    "layers.q": ("model.layers.{}.self_attn.q_proj.weight", ((1, 2), (0,))),
    "layers.k": ("model.layers.{}.self_attn.k_proj.weight", ((1, 2), (0,))),
    "layers.v": ("model.layers.{}.self_attn.v_proj.weight", ((1, 2), (0,))),
    "layers.o": ("model.layers.{}.self_attn.o_proj.weight", ((2,), (0, 1))),
    "layers.q_bias": ("model.layers.{}.self_attn.q_proj.bias", ((0, 1),)),
    "layers.k_bias": ("model.layers.{}.self_attn.k_proj.bias", ((0, 1),)),
    "layers.v_bias": ("model.layers.{}.self_attn.v_proj.bias", ((0, 1),)),
    "layers.q_norm": ("model.layers.{}.self_attn.q_norm.weight", ((0,),)),
    "layers.k_norm": ("model.layers.{}.self_attn.k_norm.weight", ((0,),)),
    "layers.mlp_norm": ("model.layers.{}.post_attention_layernorm.weight", ((0,),)),
    "layers.gate": ("model.layers.{}.mlp.gate_proj.weight", ((1,), (0,))),
    "layers.up": ("model.layers.{}.mlp.up_proj.weight", ((1,), (0,))),
    "layers.down": ("model.layers.{}.mlp.down_proj.weight", ((1,), (0,))),
}

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
FLOATS = ("F32", "F16", "BF16")
MAX_FILE_BYTES = 5 * 10**9
CHECKED_ROWS = 4096  # rows of a tied head that are compared at a time


def load_params(
    directory: str | Path, config: ModelConfig, mesh: jax.sharding.Mesh, *, dtype: Any = jnp.float32
) -> nnx.State:
    """Reads a Hugging Face directory's safetensors into stacked, sharded parameters.

    Each process reads only the slices that its devices hold. Besides the result, it keeps at most
    one parameter on the host. A tied model's redundant `lm_head.weight` is ignored.

    Raises:
      UserError: as `check_headers`; or a weight is NaN or infinite; or a tied model's
        `lm_head.weight` differs from its embedding.
    """
    _, abstract = abstract_model(config, dtype=dtype)
    shardings = dict(nnx.to_flat_state(param_shardings(abstract, mesh)))
    flat = dict(nnx.to_flat_state(abstract))
    with ExitStack() as stack:
        tensors = _open_tensors(Path(directory), stack)
        _check_tensors(Path(directory), tensors, flat, config)
        if config.tie_embeddings:
            _check_tied_head(tensors)
        loaded = {}
        for path, leaf in flat.items():
            shards: dict[tuple, np.ndarray] = {}

            def read(index, path=path, leaf=leaf, shards=shards):
                # Devices that hold the same slice share one copy on the host.
                key = tuple((part.start, part.stop) for part in index)
                if key not in shards:
                    shards[key] = _read_shard(tensors, path, leaf, index)
                return shards[key]

            array = jax.make_array_from_callback(leaf.shape, shardings[path].get_value(), read)
            loaded[path] = leaf.replace(array)
    return nnx.from_flat_state(loaded)


def check_headers(directory: str | Path, config: ModelConfig) -> None:
    """Checks the names, shapes and types of a directory's tensors without reading weights.

    Raises:
      UserError: a file is missing, truncated or outside the directory; or a tensor is missing, has
        another shape than `config` gives, is not of a float type or does not belong to the model.
    """
    flat = dict(nnx.to_flat_state(abstract_model(config)[1]))
    with ExitStack() as stack:
        tensors = _open_tensors(Path(directory), stack)
        _check_tensors(Path(directory), tensors, flat, config)


def save_params(
    directory: str | Path,
    params: nnx.State,
    config: ModelConfig,
    *,
    generation: Mapping[str, Any] | None = None,
) -> None:
    """Writes stacked parameters and their configs as a Hugging Face directory, in their dtype.

    All weights are written before an older export in `directory` is replaced. `config.json` is
    written last, so a directory that has one is complete. Other files, such as a tokenizer's, are
    kept. Every process must call this; only process 0 writes.

    Args:
      generation: content of `generation_config.json`, which names the tokens at which servers that
        load the directory stop (`read_generation_config`).
    """
    directory = Path(directory)
    writes = jax.process_index() == 0
    if writes:
        directory.mkdir(parents=True, exist_ok=True)
        for stale in directory.glob("*.part"):
            stale.unlink()
    flat = dict(nnx.to_flat_state(params))
    files = _split_into_files(flat)
    names = [f"model-{i + 1:05}-of-{len(files):05}.safetensors" for i in range(len(files))]
    names = names if len(files) > 1 else [WEIGHTS]
    weight_map = {}
    with ExitStack() as replaced:
        for name, entries in zip(names, files, strict=True):
            # Gathering a tensor is collective, so every process makes all of them.
            tensors = {hf: _to_hf(path, flat[path][...], layer) for hf, path, layer in entries}
            weight_map |= dict.fromkeys(tensors, name)
            if writes:
                save_tensors(replaced.enter_context(atomic_path(directory / name)), tensors)
        if not writes:
            return
        for old in ("config.json", INDEX):
            (directory / old).unlink(missing_ok=True)
        for old in directory.glob("model*.safetensors"):
            old.unlink()
    if len(files) > 1:
        size = sum(leaf[...].nbytes for leaf in flat.values())
        index = {"metadata": {"total_size": size}, "weight_map": weight_map}
        write_json(directory / INDEX, index, indent=2)
    write_configs(directory, config, flat["embedding",][...].dtype.name, generation or {})


def save_tensors(path: Path, tensors: dict[str, np.ndarray]) -> None:
    """Writes a safetensors file that `transformers` loads and every user may read."""
    save_file(tensors, path, metadata={"format": "pt"})
    # safetensors makes files readable only by their owner; servers may be other users.
    path.chmod(0o644)


def _entries(flat: dict) -> Iterator[tuple[str, tuple, int | None]]:
    """Yields (Hugging Face name, our path, layer or None) of every tensor of a model."""
    for path, leaf in flat.items():
        name, _ = NAMES[".".join(path)]
        if path[0] == "layers":
            for layer in range(leaf.shape[0]):
                yield name.format(layer), path, layer
        else:
            yield name, path, None


def _hf_shape(path: tuple, shape: tuple[int, ...]) -> tuple[int, ...]:
    """Returns the Hugging Face shape of one layer of a parameter of `shape`."""
    own = shape[1:] if path[0] == "layers" else shape
    return tuple(math.prod(own[axis] for axis in group) for group in NAMES[".".join(path)][1])


def _open_tensors(directory: Path, stack: ExitStack) -> dict[str, tuple[Path, Any]]:
    """Returns a dict from each tensor's Hugging Face name to its file and open handle."""
    if os.path.isfile(directory / WEIGHTS):
        return _open_file(directory / WEIGHTS, stack)
    index = directory / INDEX
    if not os.path.isfile(index):
        raise UserError(
            f"{directory} holds neither {WEIGHTS} nor {INDEX}; give a Hugging Face model "
            "directory with safetensors weights"
        )
    weight_map = _read_index(index)
    tensors = {}
    for file in sorted(set(weight_map.values())):
        if not os.path.isfile(directory / file):
            raise UserError(f"{index} names {file!r}, which is missing; fetch the model again")
        for name, at in _open_file(directory / file, stack).items():
            # A file may still hold tensors that the index takes from another one.
            if weight_map.get(name, file) != file:
                continue
            if name in tensors:
                raise UserError(
                    f"{index} does not list {name}, which is in {tensors[name][0].name} and in "
                    f"{file}; fetch the model again"
                )
            tensors[name] = at
    for name, file in weight_map.items():
        if name not in tensors:
            raise UserError(
                f"{directory / file} lacks {name}, which {INDEX} lists; fetch the model again"
            )
    return tensors


def _read_index(index: Path) -> dict[str, str]:
    """Returns the names of the tensors and the name of the file that holds each one.

    Raises:
      UserError: there is no such mapping, or a file is outside the directory. A file may be a link
        to another directory, as in the cache of the Hugging Face hub.
    """
    weight_map = read_json(index, dict, "fetch the model again").get("weight_map")
    if not isinstance(weight_map, dict):
        raise UserError(f"{index} has no readable weight_map; fetch the model again")
    for name, file in weight_map.items():
        if not isinstance(file, str):
            raise UserError(
                f"{index}: the file of {name!r} is {shown(file)}, not a text; fetch the model again"
            )
        if file in ("", ".", "..") or Path(file).name != file:
            raise UserError(
                f"{index}: the file of {name!r} is {shown(file)}, but only the names of files in "
                "the index's directory are allowed; fetch the model again"
            )
    return weight_map


def _open_file(path: Path, stack: ExitStack) -> dict[str, tuple[Path, Any]]:
    with named_errors(f"{path} is damaged or truncated", "fetch the model again"):
        handle = stack.enter_context(safe_open(path, framework="numpy"))
        return {name: (path, handle) for name in handle.keys()}  # noqa: SIM118 (not a dict)


def _check_tensors(directory: Path, tensors: dict, flat: dict, config: ModelConfig) -> None:
    """Checks that all tensors exist with the right shape and type, and that none is unused."""
    layers = {i for name in tensors for i in re.findall(r"^model\.layers\.(\d+)\.", name)}
    if len(layers) != config.num_layers:  # checked before `wanted` gets a row for each layer
        raise UserError(
            f"{directory} has weights of {len(layers)} layers, but config.json gives "
            f"num_hidden_layers={config.num_layers}; fix config.json or fetch the model again"
        )
    wanted = {name: _hf_shape(path, flat[path].shape) for name, path, _ in _entries(flat)}
    head = NAMES["unembed"][0]
    if config.tie_embeddings and head in tensors:
        wanted[head] = wanted[NAMES["embedding"][0]]
    for name, shape in wanted.items():
        if name not in tensors:
            raise UserError(
                f"{directory} lacks the tensor {name}, which config.json requires; "
                "fix config.json or fetch the model again"
            )
        path, handle = tensors[name]
        found = handle.get_slice(name)
        if tuple(found.get_shape()) != shape:
            raise UserError(
                f"{path}: {name} has shape {tuple(found.get_shape())}, config.json requires "
                f"{shape}; fix config.json or fetch the model again"
            )
        if found.get_dtype() not in FLOATS:
            raise UserError(
                f"{path}: {name} is {found.get_dtype()}, not one of {', '.join(FLOATS)}; "
                "quantised weights are not supported"
            )
    for name, (path, _) in tensors.items():
        if name not in wanted and not name.endswith("rotary_emb.inv_freq"):
            raise UserError(
                f"{path}: {name} does not belong to a {config.family} model; fix model_type in "
                "config.json or remove the tensor"
            )


def _check_tied_head(tensors: dict) -> None:
    """Raises UserError if a tied model's `lm_head.weight` is not a copy of its embedding."""
    embedding, head = NAMES["embedding"][0], NAMES["unembed"][0]
    if head not in tensors:
        return
    left, right = (tensors[name][1].get_slice(name) for name in (embedding, head))
    size = left.get_shape()[0]
    for start in range(0, size, CHECKED_ROWS):
        rows = slice(start, min(start + CHECKED_ROWS, size))
        if not np.array_equal(left[rows].astype(np.float32), right[rows].astype(np.float32)):
            raise UserError(
                f"{tensors[head][0]}: {head} differs from {embedding}, but config.json gives "
                "tie_word_embeddings=true; set it to false or remove the tensor"
            )


def _read_shard(tensors: dict, path: tuple, leaf: Any, index: tuple[slice, ...]) -> np.ndarray:
    """Reads the part of our parameter at `index`, slice by slice."""
    bounds = [part.indices(size)[:2] for part, size in zip(index, leaf.shape, strict=True)]
    shard = np.empty([stop - start for start, stop in bounds], leaf.dtype)
    name = NAMES[".".join(path)][0]
    if path[0] != "layers":
        shard[...] = _read_slice(tensors, name, path, leaf.shape, bounds)
        return shard
    for row, layer in enumerate(range(*bounds[0])):
        shard[row] = _read_slice(tensors, name.format(layer), path, leaf.shape[1:], bounds[1:])
    return shard


def _read_slice(
    tensors: dict, name: str, path: tuple, shape: tuple[int, ...], bounds: list[tuple[int, int]]
) -> np.ndarray:
    """Reads one tensor's part within `bounds` (start and stop of our dimensions)."""
    groups = NAMES[".".join(path)][1]
    hf_index = []
    for first, *rest in groups:
        # Of flattened dimensions only the outermost can be sharded (heads, never head_dim).
        inner = math.prod(shape[axis] for axis in rest)
        hf_index.append(slice(bounds[first][0] * inner, bounds[first][1] * inner))
    file, handle = tensors[name]
    block = handle.get_slice(name)[tuple(hf_index)]
    # A float64 sum of float32 values cannot overflow, so it is finite exactly if all of them are.
    with np.errstate(invalid="ignore"):  # inf - inf
        finite = np.isfinite(block.sum(dtype=np.float64))
    if not finite:
        raise UserError(
            f"{file}: {name} holds {np.isnan(block).sum()} NaN and {np.isinf(block).sum()} "
            "infinite weights; fetch the model again, or export an earlier checkpoint"
        )
    order = [axis for group in groups for axis in group]
    block = block.reshape([bounds[axis][1] - bounds[axis][0] for axis in order])
    return block.transpose(np.argsort(order))


def _to_hf(path: tuple, leaf: jax.Array, layer: int | None) -> np.ndarray:
    """Returns one Hugging Face tensor on the host. Collective if the parameter spans processes."""
    array = to_host(leaf if layer is None else leaf[layer])
    order = [axis for group in NAMES[".".join(path)][1] for axis in group]
    return np.ascontiguousarray(array.transpose(order).reshape(_hf_shape(path, leaf.shape)))


def _split_into_files(flat: dict) -> list[list[tuple[str, tuple, int | None]]]:
    """Groups the entries of a model into files of at most `MAX_FILE_BYTES`."""
    files, size = [[]], 0
    for entry in _entries(flat):
        leaf = flat[entry[1]][...]
        nbytes = leaf.nbytes if entry[2] is None else leaf.nbytes // leaf.shape[0]
        if files[-1] and size + nbytes > MAX_FILE_BYTES:
            files.append([])
            size = 0
        files[-1].append(entry)
        size += nbytes
    return files
