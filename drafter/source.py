"""Find the directory of the draft head that the user names. Imports no torch."""

from __future__ import annotations

from pathlib import Path

from engine.checkpoints.source import BUNDLED_ALIAS, CONFIG, HUB_ID, fetch_from_hub

AUTO = "auto"
# The model that each shipped head drafts for.
SHIPPED = {"smollm2-135m-instruct-eagle3": BUNDLED_ALIAS}
ACCEPTED = (
    f"{AUTO!r} (the head that ships for the model, if there is one), "
    f"{', '.join(map(repr, SHIPPED))}, a directory (config.json and *.safetensors), or a hub id "
    "such as 'org/name'"
)


def resolve_draft(draft: str | None, model: str, *, config_only: bool = False) -> Path | None:
    """The directory of the head `draft` (see `ACCEPTED`) for the target named `model`; None for no
    head. With `config_only` only the configuration is fetched from a hub. FileNotFoundError says
    what is accepted, or why the hub gave nothing."""
    if draft == AUTO:
        draft = next((head for head, target in SHIPPED.items() if target == model), None)
    if draft is None:
        return None
    path = Path(draft).expanduser()
    if draft in SHIPPED:
        return shipped_head(draft)
    if draft and path.is_dir():
        return path
    if not path.exists() and HUB_ID.fullmatch(draft):
        return fetch_from_hub(draft, patterns=CONFIG) if config_only else fetch_from_hub(draft)
    raise FileNotFoundError(f"no draft head at {draft!r}; a draft head is {ACCEPTED}")


def shipped_head(name: str) -> Path:
    """The directory of a head that comes with the package."""
    return Path(__file__).parent / "pretrained" / name
