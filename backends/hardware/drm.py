"""GPUs as the kernel lists them in /sys/class/drm: AMD's and Intel's, and NVIDIA's by name only."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from backends.contract import Gpu
from backends.hardware import files

_CARD = re.compile(r"card\d{1,3}")
_CARDS = 64
_VENDORS = {0x1002: "amd", 0x8086: "intel", 0x10DE: "nvidia"}
_MAKERS = {"amd": "AMD", "intel": "Intel", "nvidia": "NVIDIA"}
_PCI_IDS = ("usr/share/hwdata/pci.ids", "usr/share/misc/pci.ids")
_PCI_IDS_BYTES = 4 * 1024 * 1024
_INTEL_INTEGRATED = ":00:02.0"  # where every Intel GPU without memory of its own is
_METRICS_OF_APUS = (2, 3)  # format_revision in struct metrics_table_header, kgd_pp_interface.h
_APUS = {
    0x15DD: "Raven Ridge",
    0x15D8: "Picasso",
    0x1636: "Renoir",
    0x164C: "Lucienne",
    0x1638: "Cezanne",
    0x15E7: "Barcelo",
    0x163F: "Van Gogh",
    0x1435: "Van Gogh",
    0x164E: "Raphael",
    0x1506: "Mendocino",
    0x1681: "Rembrandt",
    0x15BF: "Phoenix",
    0x15C8: "Phoenix 2",
    0x1900: "Hawk Point",
    0x1901: "Hawk Point 2",
    0x150E: "Strix Point",
    0x1586: "Strix Halo",
    0x1114: "Krackan Point",
    0x13C0: "Granite Ridge",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class _Card:
    root: Path
    name: str
    vendor_id: int
    device_id: int
    pci: str
    driver: str

    @property
    def vendor(self) -> str:
        return _VENDORS[self.vendor_id]

    @property
    def directory(self) -> Path:
        return self.root / "sys/class/drm" / self.name

    @property
    def device(self) -> Path:
        return self.directory / "device"

    def number(self, name: str) -> int | None:
        return files.number(self.device / name)

    def source(self, *names: str) -> str:
        return ", ".join(f"/sys/class/drm/{self.name}/device/{name}" for name in names)


def _cards(root: Path) -> list[_Card]:
    found: dict[str, _Card] = {}
    names = [name for name in files.names(root / "sys/class/drm") if _CARD.fullmatch(name)]
    for name in names[:_CARDS]:
        device = root / "sys/class/drm" / name / "device"
        vendor_id = files.integer(files.text(device / "vendor"), 16)
        device_id = files.integer(files.text(device / "device"), 16)
        if vendor_id not in _VENDORS or device_id is None:
            continue  # a display without a GPU: bochs, virtio, a server's console
        told = files.fields(device / "uevent", "=")
        pci = told.get("PCI_SLOT_NAME", "").lower()
        found.setdefault(
            pci or name,
            _Card(
                root=root,
                name=name,
                vendor_id=vendor_id,
                device_id=device_id,
                pci=pci,
                driver=told.get("DRIVER", ""),
            ),
        )
    return list(found.values())


def _listed_name(card: _Card) -> tuple[str, str] | None:
    """Return the name that the system's list of PCI devices has, and where that is."""
    vendor, device = f"{card.vendor_id:04x}  ", f"\t{card.device_id:04x}  "
    for path in _PCI_IDS:
        inside = False
        for line in (files.text(card.root / path, _PCI_IDS_BYTES) or "").splitlines():
            if not line.startswith(("\t", "#")):
                inside = line.startswith(vendor)
            elif inside and line.startswith(device):
                return f"{_MAKERS[card.vendor]} {line.removeprefix(device).strip()}", f"/{path}"
    return None


def _name(card: _Card) -> tuple[str, str]:
    if product := files.text(card.device / "product_name"):
        return product, card.source("product_name")
    if listed := _listed_name(card):
        return listed
    if card.vendor == "amd" and card.device_id in _APUS:
        return f"AMD Radeon Graphics ({_APUS[card.device_id]})", card.source("device")
    return f"{_MAKERS[card.vendor]} GPU {card.device_id:04x}", card.source("vendor", "device")


def _is_apu(card: _Card) -> tuple[bool, str]:
    if card.device_id in _APUS:
        return True, card.source("device")
    header = files.raw(card.device / "gpu_metrics", 4) or b""  # u16 size, u8 format, u8 content
    return len(header) == 4 and header[2] in _METRICS_OF_APUS, card.source("gpu_metrics")


def _pool(card: _Card, kind: str) -> tuple[int | None, int | None]:
    """Return the total and free bytes of one of amdgpu's kinds of memory."""
    total, used = card.number(f"mem_info_{kind}_total"), card.number(f"mem_info_{kind}_used")
    return total, None if total is None or used is None else max(0, total - used)


def _amd(card: _Card, ram_bytes: int, available_bytes: int) -> Gpu:
    """Describe a GPU of amdgpu. An APU has its carve-out and what it may take of the RAM (GTT).

    GTT may be set to more than the RAM that the carve-out leaves.
    """
    name, name_source = _name(card)
    integrated, integrated_source = _is_apu(card)
    total, free = _pool(card, "vram")
    kinds = ["vram"]
    if integrated:
        gtt, gtt_free = _pool(card, "gtt")
        if total is not None and gtt is not None:
            kinds.append("gtt")
            total += min(gtt, ram_bytes)
            shared = None if gtt_free is None else min(gtt_free, available_bytes)
            free = None if free is None or shared is None else free + shared
    return Gpu(
        id=card.pci or card.name,
        vendor="amd",
        name=name,
        pci=card.pci,
        driver=card.driver,
        integrated=integrated,
        total_bytes=total,
        free_bytes=free,
        sources={
            "name": name_source,
            "integrated": integrated_source,
            "total_bytes": card.source(*(f"mem_info_{kind}_total" for kind in kinds)),
            "free_bytes": card.source(*(f"mem_info_{kind}_used" for kind in kinds)),
        },
    )


def _intel(card: _Card, ram_bytes: int, available_bytes: int) -> Gpu:
    """Describe a GPU of i915 or xe. These drivers don't say in /sys what is free.

    How much memory a card has only Intel's own build of i915 says. PCI BAR 2 is no measure of it:
    it may show a part only (256 MiB of an 8 GB card), and its sizes are powers of two.
    """
    name, name_source = _name(card)
    integrated = card.pci.endswith(_INTEL_INTEGRATED)
    total = files.number(card.directory / "lmem_total_bytes")
    total_source = f"/sys/class/drm/{card.name}/lmem_total_bytes"
    free, free_source = None, "not told by the driver"
    if integrated:
        total, total_source = ram_bytes, "the RAM"
        free, free_source = available_bytes, "the RAM that is available"
    elif total is None:
        total_source = "not told by the driver"
    return Gpu(
        id=card.pci or card.name,
        vendor="intel",
        name=name,
        pci=card.pci,
        driver=card.driver,
        integrated=integrated,
        total_bytes=total,
        free_bytes=free,
        sources={
            "name": name_source,
            "integrated": card.source("uevent") + " PCI_SLOT_NAME",
            "total_bytes": total_source,
            "free_bytes": free_source,
        },
    )


def gpus(root: Path, *, ram_bytes: int, available_bytes: int) -> list[Gpu]:
    """Return every GPU of a vendor that engines know. Never raises."""
    found = []
    for card in _cards(root):
        if card.vendor == "amd":
            found.append(_amd(card, ram_bytes, available_bytes))
        elif card.vendor == "intel":
            found.append(_intel(card, ram_bytes, available_bytes))
        else:
            name, source = _name(card)
            found.append(
                Gpu(
                    id=card.pci or card.name,
                    vendor="nvidia",
                    name=name,
                    pci=card.pci,
                    driver=card.driver,
                    sources={"name": source},
                )
            )
    return found
