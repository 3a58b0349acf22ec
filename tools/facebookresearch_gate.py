"""Runs one of facebookresearch/dlrm's scripts, unchanged, some iterations at a time.

Usage: python -I -B facebookresearch_gate.py SCRIPT FLAGS... FLAGS must make the script print every iteration with its
time (--print-freq=1 --print-time). It speaks the protocol of tools/bench/worker.py: {"do": "run", "iterations": k} is
answered with the script's own times of its next k iterations. The script stands still in between, in the middle of a
print; the iteration before the first request is not counted.

A process of its own, under the script's interpreter (Python 3.7 or newer); imports nothing of ours but the hook
beside it.
"""

import importlib.util
import json
import os
import re
import runpy
import signal
import sys

LINE = re.compile(r"Finished training it .* ([0-9.]+) ms/it,")


class Gate:
    """The script's stdout. What it prints is thrown away, but for the times."""

    encoding = "utf-8"

    def __init__(self, requests, replies):
        self.requests, self.replies = requests, replies
        self.seconds, self.wanted, self.text = [], 0, ""

    def write(self, text):
        self.text += text
        *lines, self.text = self.text.split("\n")
        for line in lines:
            found = LINE.search(line)
            if found:
                self.finished(float(found.group(1)) / 1e3)
        return len(text)

    def finished(self, seconds):
        """One iteration: the last one that was asked for is answered, and the next request waited for."""
        if self.wanted:
            self.seconds.append(seconds)
        if len(self.seconds) < self.wanted:
            return
        if self.wanted:
            self.replies.write(json.dumps({"seconds": self.seconds}) + "\n")
            self.replies.flush()
        line = self.requests.readline()
        if not line:
            os._exit(0)
        self.seconds, self.wanted = [], json.loads(line)["iterations"]

    def flush(self):
        pass

    def isatty(self):
        return False


def main(script, flags):
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent
    path = os.path.join(os.path.dirname(os.path.abspath(__file__)), "facebookresearch_hook.py")
    spec = importlib.util.spec_from_file_location("facebookresearch_hook", path)
    hook = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(hook)
    hook.stand_in_for_unused()
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    sys.stdout = Gate(sys.stdin, replies)
    sys.path.insert(0, os.path.dirname(script))
    sys.argv = [script] + flags  # noqa: RUF005 (Python 3.7)
    runpy.run_path(script, run_name="__main__")
    sys.exit("the script ended before its times were asked for")


if __name__ == "__main__":
    main(os.path.abspath(sys.argv[1]), sys.argv[2:])
