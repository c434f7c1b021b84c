"""What the loop costs beside the networks: a picture less its network calls, a step, with the emoji networks."""

from __future__ import annotations

from cases import CASES, PEERS
from pictures import PeerError, add_options, take_turns
from timing import Row, arguments, summary, write

PEERS_HERE = ("diffusers", "fourstroke-fp32", "fourstroke-openvino")


def main() -> None:
    options = add_options(arguments(__doc__, repeats=30)).parse_args()
    (case,) = CASES["emoji"]
    jobs = {
        name: (PEERS[name].module, case.job(PEERS[name].options, options.cache, options.device))
        for name in options.peers or PEERS_HERE
    }
    found = take_turns(jobs, [{"seed": i} for i in range(1 if options.tiny else options.repeats)], options)
    rows: list[Row] = []
    base = None
    for name, answers in found.items():
        if isinstance(answers, PeerError):
            rows.append({"peer": name, "note": str(answers)[:200]})
            continue
        networks = [sum(sum(seconds) for seconds in run["parts"].values()) for run in answers[1:]]
        rest = [(run["total"] - spent) / case.steps for run, spent in zip(answers[1:], networks, strict=True)]
        row: Row = {"peer": name, "steps": case.steps} | summary(rest, base)
        base = base or row["median_s"]
        rows.append(row)
    write("overhead", rows, options)


if __name__ == "__main__":
    main()
