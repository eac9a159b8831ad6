"""Which launches of `compile_all.py` need not be compiled where time is short: others show what they would.

What stays has every kernel and every tile of each architecture, every head size, both caches, prompts and decodes, all
kinds of matrix instructions, and for each kernel the most registers, but for 4. sm_90, which most run, leaves out the
least; a window without a soft cap is compiled with one alone, there too. Whether the numbers said here still hold shows
in the output of `make compile`, which compiles all.
"""

from __future__ import annotations

from typing import Any

import torch

from kernels.paging import Layout

LINEARS = {"_int8_linear_kernel", "_int8_linear_swapped_kernel"}
FOR_MANY = {"_int8_linear_pingpong_kernel", "_int8_linear_cooperative_kernel"}
EXCHANGES = {"_all_reduce_rms_norm_kernel", "_reduce_scatter_rms_norm_kernel"}


def is_double(capability: int, kernel: str, arguments: dict[str, Any]) -> bool:
    if "LAYOUT" in arguments:
        is_light = capability != 90 and is_lighter_attention(kernel, arguments)
        return is_light or is_same_attention(kernel, arguments)
    if kernel in LINEARS:
        # Those of LLM.int8(), which store another type or have one scale for the weight, take 72 for 64 or no more.
        y, ops = arguments["y_ptr"], arguments["ops"]
        is_other_type = y.dtype in (torch.bfloat16, torch.float32) and ops.bias is None
        return is_other_type or (arguments["PER_ROW"] and not arguments["PER_COLUMN"])
    if kernel in FOR_MANY:
        # The order of tiles takes no register. All tiles of the tables are there in this one, too.
        return bool(arguments["GROUP"] != 8)
    if kernel in EXCHANGES and capability != 90:
        # Of one number of ranks, a residual and a scale for each row take the most, or up to 7 fewer: 95 of 128.
        return arguments["residual_ptr"] is None or arguments["scale_ptr"] is None or arguments["STATIC"]
    return False


def is_same_attention(kernel: str, arguments: dict[str, Any]) -> bool:
    """Whether one that stays is the same but for a part that it has besides, or the type."""
    layout, dtype = arguments["LAYOUT"], type_of(arguments)
    if layout.WINDOW is not None and layout.SOFT_CAP is None:
        # A soft cap comes on top of a window, and takes 2 registers fewer at most.
        return True
    if layout.D == 64 and layout.K_SCALE is None and dtype == torch.bfloat16:
        # Over floats both types take as many, and wider heads have the instructions of this one.
        return True
    if kernel == "_paged_attention_kernel" and layout.GROUP > 8:
        # The rows of a prompt's tile are alike, whatever heads they are of.
        return True
    if kernel == "_prefill_on_hopper_kernel":
        # Half the columns take less memory and as many registers.
        return bool(layout.D == 64)
    if kernel == "_decode_on_hopper_kernel":
        # One that rotates, or leaves parts, holds what the others do.
        return arguments["rotation"] is None and (layout.D != 128 or arguments["parts"].y is not None)
    if kernel != "_paged_decode_kernel" or arguments["parts"].arrivals is None:
        return False
    # A decode that rotates holds what one behind a rotation does. At head size 128 both stay.
    return arguments["rotation"] is None and (layout.D != 128 or dtype == torch.float32)


def is_lighter_attention(kernel: str, arguments: dict[str, Any]) -> bool:
    """Whether its tile is that of one with more registers, or few less: a prompt over floats takes up to 14 more than
    what stays, 159 in all, a decode up to 40 more, at most 178.
    """
    layout, dtype, has_window = arguments["LAYOUT"], type_of(arguments), arguments["LAYOUT"].WINDOW is not None
    is_int8 = layout.K_SCALE is not None
    # Of these both types are compiled, and over codes bfloat16 takes more.
    has_twin = is_int8 and not has_window and layout.D in (64, 128) and dtype == torch.float16
    if has_twin and kernel != "_dequantize_kernel":
        return True
    if kernel == "_rope_and_cache_kernel":
        return layout.D == 256 and dtype == torch.float16
    if kernel == "_paged_decode_kernel":
        if layout.D == 256:
            # Behind a window its tile is the same.
            return not has_window
        is_apart = arguments["rotation"] is None and arguments["parts"].arrivals is not None
        return has_window or arguments["SPLITS"] == 1 or (is_apart and not is_int8) or has_less_floats(layout, dtype)
    if kernel == "_paged_attention_kernel":
        if arguments["DEQUANTIZED"]:
            # Prompts over a float cache but for where the keys are: of one layout.
            return layout.D != 128 or has_window
        # Over floats a window changes no tile.
        return has_less_floats(layout, dtype) or (layout.D == 256 and not has_window and not is_int8)
    return False


def has_less_floats(layout: Layout, dtype: torch.dtype | None) -> bool:
    """A float cache, where one of codes has the tile, or another head size has it."""
    return layout.K_SCALE is None and (layout.D == 96 or dtype == torch.float32)


def type_of(arguments: dict[str, Any]) -> torch.dtype | None:
    """Of queries, or of the keys that are written."""
    return next((arguments[key].dtype for key in ("q_ptr", "qkv_ptr", "k_out_ptr") if key in arguments), None)
