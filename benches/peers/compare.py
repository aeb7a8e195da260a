#!/usr/bin/env python3
"""Tables of our measurements beside those of others, in Markdown.

  python compare.py OURS.jsonl [OURS2.jsonl ...] --peers PEERS.jsonl [...] [--op ssd] [--errors]

OURS come from `terrarium bench ops --json`, PEERS from gpu.py. A file is one run; with several, a time is the median over runs, and its spread
goes from the fastest batch of all runs to the slowest. A ratio is the peer's time over ours: above 1 ours is faster; in brackets its
range, slowest against fastest. Put both sides into one session of one machine: only the ratio means something elsewhere.
"""
import argparse, json, statistics, sys


def read(files):
    """(machines, {(op, case): {path: [row, ...]}})"""
    machines, rows = [], {}
    for file in files:
        dtype = None
        for line in open(file):
            value = json.loads(line)
            if "op" not in value:
                machines.append(value)
                dtype = value["dtype"]
            elif value["case"]:
                # A case in another type than the machine's is another case.
                case = value["case"] if value["dtype"] == dtype else f"{value['case']} {value['dtype'].lower()}"
                rows.setdefault((value["op"], case), {}).setdefault(value["path"], []).append(value)
    return machines, rows


class Time:
    """Median and range over runs of one direction."""

    def __init__(self, rows, direction):
        speeds = [row[direction] for row in rows if row.get(direction)]
        self.speeds, self.there = speeds, bool(speeds)
        if speeds:
            self.ms = statistics.median(speed["ms"] for speed in speeds)
            self.low, self.high = min(speed["min"] for speed in speeds), max(speed["max"] for speed in speeds)

    def __str__(self):
        return f"{digits(self.ms)} ({digits(self.low)}-{digits(self.high)})" if self.there else "-"

    def over(self, other):
        """How many times as long as `other`."""
        if not (self.there and other.there):
            return "-"
        return f"**{self.ms / other.ms:.2f}** ({self.low / other.high:.2f}-{self.high / other.low:.2f})"

    def share(self, name):
        values = [speed[name] for speed in self.speeds if speed.get(name)]
        return f"{100 * statistics.median(values):.0f} %" if values else "-"


def digits(value):
    return f"{value:.0f}" if value >= 100 else f"{value:.1f}" if value >= 10 else f"{value:.3f}" if value >= 0.1 else f"{value:.4f}"


def table(headings, lines):
    print("| " + " | ".join(headings) + " |")
    print("|" + "---|" * len(headings))
    for line in lines:
        print("| " + " | ".join(line) + " |")
    print()


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("ours", nargs="+")
    parser.add_argument("--peers", nargs="*", default=[])
    parser.add_argument("--op", default="")
    parser.add_argument("--errors", action="store_true", help="tables of errors too")
    options = parser.parse_args()
    machines, ours = read(options.ours)
    peer_machines, peers = read(options.peers)
    print("Measured on:\n")
    for who, all_machines in (("ours", machines), ("peers", peer_machines)):
        for machine in all_machines:
            rates = f"; copy {machine['copy_tbs']:.2f} TB/s, matrix product {machine['matmul_tflops']:.0f} TFLOP/s" if machine.get("copy_tbs") else ""
            print(f"- {who}: {machine['device']}, {machine['dtype']}{rates}")
    print()
    operations = []
    for op, _ in list(ours) + list(peers):
        if op not in operations and (not options.op or op in options.op.split(",")):
            operations.append(op)
    for op in operations:
        cases = [case for name, case in dict.fromkeys(list(ours) + list(peers)) if name == op]
        paths = list(dict.fromkeys(path for case in cases for path in peers.get((op, case), {})))
        print(f"### {op}\n")
        for direction, title in (("forward", "forward"), ("both", "forward + backward")):
            lines = []
            for case in cases:
                mine = [row for rows in ours.get((op, case), {}).values() for row in rows]
                time = Time(mine, direction)
                others = [Time(peers.get((op, case), {}).get(path, []), direction) for path in paths]
                if time.there or any(other.there for other in others):
                    cells = [cell for other in others for cell in (str(other), other.over(time))]
                    lines.append([case, str(time), time.share("of_copy"), time.share("of_matmul")] + cells)
            if lines:
                headings = [title, "ours, ms", "of copy", "of matmul"] + [cell for path in paths for cell in (f"{path}, ms", "ratio")]
                table(headings, lines)
        if options.errors:
            errors(op, cases, ours, peers)
        wrong = sorted({f"{case}: {row['note']}" for case in cases for rows in ours.get((op, case), {}).values() for row in rows if row["failed"]})
        for line in wrong:
            print(f"- failed: {line}")
        if wrong:
            print()


def errors(op, cases, ours, peers):
    lines, names = [], []
    found = []
    for case in cases:
        for who, source in (("ours", ours), ("", peers)):
            for path, rows in source.get((op, case), {}).items():
                values = {error["name"]: error["error"] for row in rows for error in row["errors"]}
                if values:
                    found.append((case, who or path, values))
                    names += [name for name in values if name not in names]
    for case, who, values in found:
        lines.append([case, who] + [f"{values[name]:.2e}" if values.get(name) is not None else "-" for name in names])
    if lines:
        table(["relative error", "whose"] + names, lines)


if __name__ == "__main__":
    try:
        main()
    except BrokenPipeError:
        sys.exit(0)
