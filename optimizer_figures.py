from pathlib import Path


def draw_optimizer_run(directory) -> list[Path]:
    return []
