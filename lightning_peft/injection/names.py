"""The names of slots: an adapter's own (``default``), and ``default:<part>`` where it has several on one host."""

from lightning_peft.network.walk import CHILD


def adapter_name(slot: str) -> str:
    """The adapter that a slot belongs to: ``"default"`` of ``"default:out_proj"``."""
    return slot.partition(":")[0]


def owner_of(key: str) -> tuple[str, str] | None:
    """The path of the host and the adapter's name, of the name of an adapter's tensor; None for a name of the base."""
    host, found, rest = f".{key}".partition(f".{CHILD}.")
    return (host[1:], adapter_name(rest.partition(".")[0])) if found else None


def part_name(slot: str) -> str:
    """Which of an adapter's several on one host it is: ``"out_proj"`` of ``"default:out_proj"``, else empty."""
    return slot.partition(":")[2]


def slot_name(name: str, part: str) -> str:
    """The slot of one part of adapter ``name``; an adapter of a single part has none."""
    return f"{name}:{part}" if part else name
