"""A command in which one process of a team meets an error of its own."""

from experiment.command_line import UserError, run_command
from experiment.processes import join_team


def main(argv: list[str] | None = None) -> None:
    """The second process ends; the first waits for it."""
    team = join_team()
    if not team.first:
        raise UserError("only here")
    team.gathered(None)


if __name__ == "__main__":
    run_command(main)
