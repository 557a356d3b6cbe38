"""R as a judge: scripts over data frames, and analyses whose numbers ours have to match."""

from __future__ import annotations

import csv
import shutil
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path

import pytest

Record = Mapping[str, object]
"""A row of a data frame."""


def requires_r(*packages: str) -> pytest.MarkDecorator:
    """Skips where R or one of these packages is not installed."""
    lacking = ["Rscript"] if shutil.which("Rscript") is None else sorted(set(packages) - installed_packages())
    return pytest.mark.skipif(bool(lacking), reason=f"R as a judge needs {', '.join(lacking)}")


@lru_cache
def installed_packages() -> frozenset[str]:
    command = ["Rscript", "-e", "cat(list.files(.libPaths()))"]
    return frozenset(subprocess.run(command, capture_output=True, text=True, check=True).stdout.split())


def run_r(script: str, **frames: Sequence[Record]) -> list[dict[str, str]]:
    """The rows of the data frame `result` that a script leaves; each of the frames is a variable of it.

    Strings become factors. R takes about half a second to start, so one script best has all cases of a test.
    """
    with tempfile.TemporaryDirectory() as folder:
        lines = []
        for name, rows in frames.items():
            with (Path(folder) / f"{name}.csv").open("w", newline="") as file:
                writer = csv.DictWriter(file, list(rows[0]))
                writer.writeheader()
                writer.writerows(rows)
            lines.append(f"{name} <- read.csv('{name}.csv', stringsAsFactors = TRUE)")
        lines += [script, "write.csv(result, 'result.csv', row.names = FALSE)"]
        (Path(folder) / "script.R").write_text("\n".join(lines))
        done = subprocess.run(["Rscript", "script.R"], cwd=folder, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        with (Path(folder) / "result.csv").open() as file:
            return list(csv.DictReader(file))


REPEATED_MEASURES = """
factors <- setdiff(names(data), c("seed", "y", "design"))
result <- do.call(rbind, lapply(split(data, data$design), function(d) {
  d <- droplevels(d); d$seed <- factor(d$seed); for (f in factors) d[[f]] <- factor(d[[f]])
  used <- factors[sapply(factors, function(f) nlevels(d[[f]]) > 1)]
  terms <- paste(used, collapse = " * ")
  strata <- summary(aov(as.formula(paste("y ~", terms, "+ Error(seed / (", terms, "))")), d))
  do.call(rbind, lapply(strata, function(stratum) {
    t <- stratum[[1]]
    if (nrow(t) < 2) return(NULL)
    data.frame(design = d$design[1], term = trimws(rownames(t)[1]), f = t[1, "F value"], df1 = t[1, "Df"],
               df2 = t[2, "Df"], p = t[1, "Pr(>F)"])
  }))
}))
"""


def r_repeated_measures_of(
    designs: Mapping[str, Sequence[Record]],
) -> dict[str, dict[str, tuple[float, float, float, float]]]:
    """{design: {term: (F, df1, df2, p)}} of univariate repeated measures, as `r_repeated_measures`, by one R process.

    Designs may have different factors; a factor that a design lacks is left out of it.
    """
    names = dict.fromkeys(name for rows in designs.values() for row in rows for name in row)
    blank = dict.fromkeys(names, "none")
    data = [{"design": design, **blank, **row} for design, rows in designs.items() for row in rows]
    found: dict[str, dict[str, tuple[float, float, float, float]]] = {design: {} for design in designs}
    for row in run_r(REPEATED_MEASURES, data=data):
        numbers = (float(row["f"]), float(row["df1"]), float(row["df2"]), float(row["p"]))
        found[row["design"]][row["term"]] = numbers
    return found


def r_repeated_measures(data: Sequence[Record]) -> dict[str, tuple[float, float, float, float]]:
    """{term: (F, df1, df2, p)} by R's `aov` with `Error(seed / (factors))`: each term against term x seed.

    data: a row for every run of a full factorial, with `seed`, `y`, and a column for each factor, whose names are R's
    (letters, digits, `_` and `.`). Terms are named `a`, `b`, `a:b`, in the order of the columns. No sphericity
    correction: a contrast of one degree of freedom needs none.
    """
    return r_repeated_measures_of({"only": data})["only"]


def r_paired_t(pairs: Mapping[str, tuple[Sequence[float], Sequence[float]]]) -> dict[str, dict[str, float]]:
    """{name: mean, low, high, degrees, p} by R's `t.test(..., paired = TRUE)`; pairs: {name: (arm, baseline)}."""
    script = """
    result <- do.call(rbind, lapply(split(data, data$name), function(d) {
      t <- t.test(d$arm, d$baseline, paired = TRUE)
      data.frame(name = d$name[1], mean = t$estimate, low = t$conf.int[1], high = t$conf.int[2],
                 degrees = t$parameter, p = t$p.value)
    }))
    """
    data = [
        {"name": name, "arm": a, "baseline": b}
        for name, (arm, baseline) in pairs.items()
        for a, b in zip(arm, baseline, strict=True)
    ]
    rows = run_r(script, data=data)
    return {row["name"]: {key: float(value) for key, value in row.items() if key != "name"} for row in rows}


def r_adjusted(families: Mapping[str, Sequence[float]], method: str) -> dict[str, list[float]]:
    """{family: adjusted p-values} by R's `p.adjust`; method: `holm`, `BH`, `bonferroni` and others of R."""
    data = [{"family": name, "p": p} for name, ps in families.items() for p in ps]
    rows = run_r(f"result <- transform(data, p = ave(p, family, FUN = function(x) p.adjust(x, '{method}')))", data=data)
    found: dict[str, list[float]] = {name: [] for name in families}
    for row in rows:
        found[row["family"]].append(float(row["p"]))
    return found
