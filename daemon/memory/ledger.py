"""The ledger: what is booked for each model, and how much RAM one more may take. Effects: none.

`budget_bytes` is what all models together may take. A reservation is made before a load starts and
kept until the model's process is gone. A file that several workers map is in memory once, and is
counted once: when one of them leaves, the others still hold it.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field, replace

from daemon.memory.measure import Use

GIB = 1024**3
_RESERVE_SHARE = 4  # of a small machine's RAM, a quarter is left to everything else
_WATERMARK_SHARE = 16
_NOTHING = Use()


@dataclass(frozen=True, slots=True, kw_only=True)
class Reservation:
    """What is booked for one model.

    `use` is the most that was measured of each part, `now` what was measured last; both are empty
    until the first measurement. `shared` are bytes of files that were in memory already when it was
    booked, by their keys. `gpu_estimate` are bytes of GPU memory by `Gpu.id`.
    """

    unique: str
    estimate_bytes: int
    use: Use = _NOTHING
    now: Use = _NOTHING
    shared: Mapping[str, int] = field(default_factory=dict)
    gpu_estimate: Mapping[str, int] = field(default_factory=dict)

    @property
    def measured_bytes(self) -> int:
        """The most that was measured; 0 until then."""
        return self.use.total_bytes

    @property
    def reserved_bytes(self) -> int:
        """The larger of what was estimated and what was measured."""
        return max(self.estimate_bytes, self.measured_bytes)

    @property
    def gpus(self) -> Mapping[str, int]:
        """The bytes that it takes of GPUs, as measured where the driver tells."""
        return {**self.gpu_estimate, **self.use.gpus}

    @property
    def files(self) -> Mapping[str, int]:
        """The bytes of files that it has in memory, as far as that is known."""
        return self.use.files or self.shared


def budget(limit_bytes: int | None, reserve_bytes: int | None, ram_bytes: int) -> int:
    """Return what models may take: the explicit limit, else the RAM less the reserve.

    Without a `reserve_bytes` that is 2 GiB, or a quarter of the RAM if that is less.
    """
    if limit_bytes is not None:
        return limit_bytes
    if reserve_bytes is None:
        reserve_bytes = min(2 * GIB, ram_bytes // _RESERVE_SHARE)
    return max(0, ram_bytes - reserve_bytes)


def watermark(wanted_bytes: int | None, ram_bytes: int) -> int:
    """Return the available RAM below which idle models leave.

    Without a wish that is 1 GiB, or a sixteenth of the RAM if that is less.
    """
    return min(GIB, ram_bytes // _WATERMARK_SHARE) if wanted_bytes is None else wanted_bytes


def booked_bytes(reservations: Iterable[Reservation]) -> int:
    """Return what these take together: each file that several of them have counts once. Pure."""
    total = 0
    files: dict[str, list[int]] = {}
    for entry in reservations:
        total += entry.reserved_bytes
        for path, size in entry.files.items():
            files.setdefault(path, []).append(size)
    return total - sum(sum(sizes) - max(sizes) for sizes in files.values())


def _resident(reservations: Iterable[Reservation]) -> dict[str, int]:
    """Return the bytes of each file that these have in memory, as measured last."""
    files: dict[str, int] = {}
    for entry in reservations:
        for path, size in entry.now.files.items():
            files[path] = max(size, files.get(path, 0))
    return files


@dataclass(frozen=True, slots=True, kw_only=True)
class Book:
    """The ledger at one moment: what is booked, and how much RAM was available then.

    `available_bytes` is what could be used without pushing anything but page cache out;
    `watermark_bytes` of it are left alone.
    """

    budget_bytes: int
    available_bytes: int
    watermark_bytes: int
    reservations: Mapping[str, Reservation]

    def room(self, gone: Collection[str] = (), files: Collection[str] = ()) -> int:
        """Return what a load of `files` could take if the models `gone` were not there.

        That is what would be left of the budget, and of the RAM that is free once the others have
        all that is booked for them; more by what of its files is in memory already.
        """
        there = _resident(self._without(gone))
        return min(self.unbooked_bytes(gone), self.free_bytes(gone)) + sum(
            there.get(path, 0) for path in files
        )

    def _without(self, gone: Collection[str]) -> list[Reservation]:
        return [entry for key, entry in self.reservations.items() if key not in gone]

    def unbooked_bytes(self, gone: Collection[str] = ()) -> int:
        """Return what would be left of the budget if the models `gone` were not there."""
        return self.budget_bytes - booked_bytes(self._without(gone))

    def free_bytes(self, gone: Collection[str] = ()) -> int:
        """Return the RAM that would be left above the watermark without the models `gone`.

        All others are taken to have what is booked for them.
        """
        rest = self._without(gone)
        leaving = sum(
            entry.now.private_bytes for key, entry in self.reservations.items() if key in gone
        )
        untouched = booked_bytes(rest) - sum(entry.now.private_bytes for entry in rest)
        return self.available_bytes + leaving - untouched - self.watermark_bytes

    def spare_bytes(self) -> int:
        """Return the RAM that is available, less the weights that models have mapped.

        The kernel counts these as page cache that it could give up, but a model without them is
        what freezes a machine.
        """
        return self.available_bytes - sum(_resident(self.reservations.values()).values())

    def held_bytes(self, models: Collection[str]) -> int:
        """Return the RAM that would be spare if these models went, as measured last."""
        gone = [entry for key, entry in self.reservations.items() if key in models]
        rest = [entry for key, entry in self.reservations.items() if key not in models]
        files = sum(_resident(self.reservations.values()).values()) - sum(_resident(rest).values())
        return files + sum(entry.now.private_bytes for entry in gone)


class Ledger:
    """Reservations by model id. `available` returns the RAM that is available now: see Book.

    `rule` says, for a person, where the budget comes from.
    """

    def __init__(
        self,
        budget_bytes: int,
        available: Callable[[], int],
        watermark_bytes: int = 0,
        *,
        rule: str = "[memory] limit",
    ) -> None:
        self.budget_bytes = budget_bytes
        self.rule = rule
        self.watermark_bytes = watermark_bytes
        self._available = available
        self.reservations: dict[str, Reservation] = {}

    def book(self) -> Book:
        """Return how things are now. That reads some files: once for all that is decided."""
        return Book(
            budget_bytes=self.budget_bytes,
            available_bytes=self._available(),
            watermark_bytes=self.watermark_bytes,
            reservations=dict(self.reservations),
        )

    @property
    def reserved_bytes(self) -> int:
        """What is booked for all models."""
        return booked_bytes(self.reservations.values())

    def available_bytes(self) -> int:
        """Return what another load may take now."""
        return max(0, self.book().room())

    def reserve(
        self,
        model_id: str,
        unique: str,
        estimate_bytes: int,
        files: Collection[str] = (),
        gpus: Mapping[str, int] | None = None,
    ) -> None:
        """Book a load; whoever does has made sure that it fits."""
        there = _resident(self.reservations.values())
        self.reservations[model_id] = Reservation(
            unique=unique,
            estimate_bytes=estimate_bytes,
            shared={path: there[path] for path in files if path in there},
            gpu_estimate=gpus or {},
        )

    def measured(self, model_id: str, use: Use) -> None:
        """Note what a model was seen to use; its booking never shrinks below its peak."""
        if entry := self.reservations.get(model_id):
            self.reservations[model_id] = replace(entry, use=_peak(entry.use, use), now=use)

    def noted(self, model_id: str, private_bytes: int) -> None:
        """Note what a model has of its own by now, between measurements of all that it uses.

        While it is being loaded that is a part of what is booked for it.
        """
        entry = self.reservations.get(model_id)
        if entry is None:
            return
        now = replace(entry.now, private_bytes=private_bytes)
        if entry.measured_bytes:
            self.measured(model_id, now)
        else:
            self.reservations[model_id] = replace(entry, now=now)

    def release(self, model_id: str) -> None:
        """Give back what was booked, once the process is gone."""
        self.reservations.pop(model_id, None)


def _peak(one: Use, other: Use) -> Use:
    files = {
        path: max(one.files.get(path, 0), other.files.get(path, 0))
        for path in {*one.files, *other.files}
    }
    gpus = {
        gpu: max(one.gpus.get(gpu, 0), other.gpus.get(gpu, 0)) for gpu in {*one.gpus, *other.gpus}
    }
    return Use(private_bytes=max(one.private_bytes, other.private_bytes), files=files, gpus=gpus)
