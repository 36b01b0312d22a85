# Copyright 2026 The tapo_trl authors
# SPDX-License-Identifier: Apache-2.0

from .parser import RecipeParser
from .tables import format_table


COLUMNS = ("name", "reads", "range", "memory", "weights", "licence", "source")


def make_parser() -> RecipeParser:
    """Parser of `tapo-trl rewards`."""
    from .arguments import RewardsArguments

    return RecipeParser((RewardsArguments,), prog="tapo-trl rewards")


def list_facts(torch_dtype: str | None = None) -> list[dict[str, str]]:
    """
    What is known of each pretrained reward, without loading it.

    Args:
        torch_dtype (`str`, *optional*): Precision for which the memory is given.

    Returns:
        `list[dict[str, str]]`: The columns of the table.
    """
    from ..rewards import list_rewards
    from ..rewards.pretrained import reward_class

    facts = []
    for name in list_rewards():
        scorer = reward_class(name)
        size = scorer.memory(torch_dtype)
        values = (
            name,
            f"{scorer.reads}s",
            "{:g} to {:g}".format(*scorer.score_range),
            f"{size / 2**30:.1f} GiB" if size else "on the CPU",
            scorer.weights or "in its package",
            scorer.license,
            scorer.citation,
        )
        facts.append(dict(zip(COLUMNS, values, strict=True)))
    return facts


def main(args) -> None:
    """
    Prints the table, or fetches an instruction.

    Args:
        args ([`RewardsArguments`]): The precision, or the reward whose instruction is fetched.
    """
    if args.prepare is not None:
        from ..rewards.pretrained.instructions import prepare_instruction

        path = prepare_instruction(args.prepare, args.source)
        print(f"The instruction of the reward `{args.prepare}` is in {path}.")
        return
    print(format_table(list_facts(args.torch_dtype)))
    print("\nUse one by its name: `--reward_model pickscore`. The memory is that of the weights on the accelerator.")
