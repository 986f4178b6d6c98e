"""The records of recipes/study.py against the frontier of plain training: metric at a cost, paired by seed.

docs/evidence.md says in words what is done here.
"""

from __future__ import annotations

import statistics
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import project_paths  # noqa: F401
from paired import half_width
from study_arms import SETTINGS, Arm, Setting, arms
from study_run import StudyError, read

Records = dict[str, dict[int, dict[str, Any]]]
"""Of a setting: by arm and seed."""


@dataclass(frozen=True)
class Study:
    """What there is of a setting."""

    setting: Setting
    records: Records

    def values(self, arm: str) -> dict[int, float]:
        """The metric by seed, so that more is better."""
        sign = 1 if self.setting.metric == "top1" else -1
        return {seed: sign * record["result"][self.setting.metric] for seed, record in self.records[arm].items()}

    def cost(self, arm: str) -> float:
        """FLOPs of the whole training, divided by those of `standard`."""
        flops = [record["result"]["flops"] for record in self.records[arm].values()]
        whole = [record["result"]["flops"] for record in self.records["standard"].values()]
        return statistics.fmean(flops) / statistics.fmean(whole)

    @property
    def commit(self) -> str:
        """Of all its records."""
        return next(str(record["commit"]) for seeds in self.records.values() for record in seeds.values())

    def present(self) -> list[Arm]:
        """The arms of which there is a record."""
        return [arm for arm in arms(self.setting) if arm.name in self.records]

    def frontier(self) -> list[tuple[float, str]]:
        """The controls, by cost, that no cheaper or equally dear one reaches in the mean over their common seeds."""
        plain = [arm.name for arm in self.present() if arm.plain]
        common = set.intersection(*(set(self.records[name]) for name in plain)) if plain else set()
        if "standard" not in plain or not common:
            return []
        kept: list[tuple[float, str]] = []
        best = float("-inf")
        means = {name: statistics.fmean(self.values(name)[seed] for seed in common) for name in plain}
        for cost, name in sorted(((self.cost(name), name) for name in plain), key=lambda c: (c[0], -means[c[1]])):
            if means[name] > best:
                best = means[name]
                kept.append((cost, name))
        return kept

    def plain_at(self, cost: float) -> dict[int, float]:
        """The metric of plain training at a cost, by seed; empty where nothing is so cheap."""
        points = self.frontier()
        if not points or cost < points[0][0] * (1 - 1e-9):
            return {}
        lower = max((point for point in points if point[0] <= cost * (1 + 1e-9)), key=lambda point: point[0])
        upper = min((point for point in points if point[0] > cost * (1 + 1e-9)), default=lower)
        share = 0.0 if upper == lower else (cost - lower[0]) / (upper[0] - lower[0])
        low, high = self.values(lower[1]), self.values(upper[1])
        return {seed: low[seed] + share * (high[seed] - low[seed]) for seed in low.keys() & high.keys()}

    def points(self) -> dict[Arm, tuple[float, float, float]]:
        """Cost, metric and half of the 95 % interval of each arm that shares a seed with `standard`.

        The metric is the mean of `standard` and the mean difference to it over common seeds, and the interval is that
        difference's: what seeds have in common is no part of it.
        """
        found: dict[Arm, tuple[float, float, float]] = {}
        standard = self.values("standard") if "standard" in self.records else {}
        for arm in self.present():
            pairs = differences(self.values(arm.name), standard)
            if pairs and not arm.tunes:
                spread = half_width(pairs) if len(pairs) > 1 and arm.name != "standard" else 0.0
                value = statistics.fmean(standard.values()) + statistics.fmean(pairs)
                found[arm] = (self.cost(arm.name), abs(value), spread)
        return found


def read_studies(folder: Path) -> list[Study]:
    """Read the records below a folder.

    Raises:
        StudyError: there are none, one is damaged, or those of a setting are of several commits.
    """
    studies = []
    for setting in SETTINGS.values():
        records: Records = {}
        for path in sorted((folder / setting.name).glob("*/seed-*.json")):
            record = read(path)
            try:
                float(record["result"][setting.metric]), float(record["result"]["flops"])
                records.setdefault(str(record["arm"]), {})[int(record["seed"])] = record
            except (KeyError, TypeError, ValueError) as error:
                raise StudyError(f"{path} is no record of a run ({error}): remove it, and it is made again") from error
        commits = {record["commit"] for seeds in records.values() for record in seeds.values()}
        if len(commits) > 1:
            raise StudyError(f"the records of {setting.name} are of {len(commits)} commits: keep those of one")
        if records:
            studies.append(Study(setting, records))
    if not studies:
        raise StudyError(f"no records below {folder}: run recipes/study.py first")
    return studies


def differences(values: dict[int, float], reference: dict[int, float]) -> list[float]:
    """Paired by seed."""
    return [values[seed] - reference[seed] for seed in sorted(values.keys() & reference.keys())]


def compared(studies: list[Study]) -> dict[tuple[str, str], list[float]]:
    """The differences to plain training at the same cost, of each arm that is compared and has two seeds."""
    found = {}
    for study in studies:
        for arm in study.present():
            if not arm.plain and not arm.tunes and "standard" in study.records:
                pairs = differences(study.values(arm.name), study.plain_at(study.cost(arm.name)))
                if len(pairs) > 1:
                    found[study.setting.name, arm.name] = pairs
    return found


def missing(studies: list[Study]) -> list[str]:
    """The arms that lack seeds, a line each, with the command that makes them."""
    lines = []
    for study in studies:
        for arm in arms(study.setting):
            absent = [seed for seed in range(arm.seeds) if seed not in study.records.get(arm.name, {})]
            if absent:
                command = f"python recipes/study.py --settings {study.setting.name} --arms {arm.name}"
                lines.append(f"{study.setting.name}: {arm.name}, seeds {' '.join(map(str, absent))} ({command})")
    return lines
