"""Number of LoRA experts in each layer (MoLA, arXiv 2402.08562, section 3): given as digits, as a
shape with a total, or layer by layer."""

from collections.abc import Sequence

from btx_jax.errors import UserError

# Experts in each quarter of the depth, bottom to top, for a total of 20 in four layers.
SHAPES = {
    "triangle": (8, 6, 4, 2),
    "inverted": (2, 4, 6, 8),
    "hourglass": (8, 2, 2, 8),
    "diamond": (2, 8, 8, 2),
    "rectangle": (5, 5, 5, 5),
}
MAX_EXPERTS = 4096  # in one layer
MAX_DIGITS = 9


def experts_per_layer(allocation: str, layers: int) -> tuple[int, ...]:
    """Experts of each layer, from an allocation.

    `2468`: layer l of L gets digit floor(n l / L) of n digits; if n does not divide L, block
    lengths differ by one (30 layers and 4 digits: blocks of 8, 7, 8 and 7). `triangle:160`, or
    another of SHAPES: 160 experts in total, in the shape's proportions by largest remainder, with
    ties going to the lower layer. `2,2,4,4`: one number per layer; 0 leaves a layer unchanged.
    Raises UserError when the allocation cannot be parsed or does not fit the depth.
    """
    name, _, total = allocation.partition(":")
    if name in SHAPES:
        return _shaped(allocation, SHAPES[name], total, layers)
    if "," in allocation:
        numbers = [part.strip() for part in allocation.split(",")]
        if not all(number.isdecimal() and len(number) <= MAX_DIGITS for number in numbers):
            raise UserError(f"allocation={allocation[:80]!r}: must be whole numbers, one per layer")
        if len(numbers) != layers:
            raise UserError(
                f"allocation={allocation[:80]!r}: {len(numbers)} numbers for {layers} layers; give"
                " one per layer"
            )
        return _some([int(number) for number in numbers], allocation)
    if not allocation.isdecimal() or not allocation.isascii():
        raise UserError(
            f"allocation={allocation[:80]!r}: must be digits such as 2468, a shape with its total"
            f" such as triangle:160 ({', '.join(SHAPES)}), or one number per layer"
        )
    if len(allocation) > layers:
        raise UserError(
            f"allocation={allocation[:80]!r}: {len(allocation)} digits for {layers} layers;"
            " give at most one per layer"
        )
    return _some(
        [int(allocation[len(allocation) * layer // layers]) for layer in range(layers)], allocation
    )


def _shaped(allocation: str, shape: Sequence[int], total: str, layers: int) -> tuple[int, ...]:
    if not total.isdecimal() or len(total) > MAX_DIGITS or not int(total):
        raise UserError(
            f"allocation={allocation[:80]!r}: a shape needs the total number of experts, such"
            f" as {allocation.partition(':')[0]}:160"
        )
    if layers < len(shape):
        raise UserError(
            f"allocation={allocation[:80]!r}: {layers} layers, but this shape needs at least"
            f" {len(shape)}"
        )
    weights = [shape[len(shape) * layer // layers] for layer in range(layers)]
    # Each layer's exact share is count + remainder / sum(weights), kept in integers.
    counts, remainders = zip(
        *(divmod(int(total) * weight, sum(weights)) for weight in weights), strict=True
    )
    by_remainder = sorted(range(layers), key=lambda layer: -remainders[layer])
    first = set(by_remainder[: int(total) - sum(counts)])
    result = [count + (layer in first) for layer, count in enumerate(counts)]
    if 0 in result:
        raise UserError(
            f"allocation={allocation[:80]!r}: too few for {layers} layers: layer"
            f" {result.index(0)} would get none; raise the total"
        )
    return _some(result, allocation)


def _some(counts: Sequence[int], allocation: str) -> tuple[int, ...]:
    if not any(counts):
        raise UserError(
            f"allocation={allocation[:80]!r}: every layer gets 0 experts; give at least one"
        )
    if max(counts) > MAX_EXPERTS:
        raise UserError(
            f"allocation={allocation[:80]!r}: {max(counts)} experts in layer"
            f" {counts.index(max(counts))}, but at most {MAX_EXPERTS} are supported"
        )
    return tuple(counts)
