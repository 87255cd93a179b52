"""What one load process is told to do, and the lines in which it reports; both travel as JSON.

A job is bounded three times over: by `messages`, by `seconds` (after which nothing new begins) and by `deadline_s`
(after which the process ends, whatever is still open). 0 messages or 0 seconds mean that the other bound counts.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass


class JobError(Exception):
    """A job that has no bound, or makes no sense."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """Sizes in bytes; rates in messages a second, 0 for a closed loop; times in seconds."""

    stream: int
    port: int
    sender: str
    recipient: str
    ledger_file: str
    deadline_s: float
    sessions: int = 1
    messages: int = 0
    seconds: float = 0.0
    rate: float = 0.0
    size_bytes: int = 4096
    # Sessions are opened evenly over this time; 0 opens all at once.
    connect_over_s: float = 0.0
    # 0 keeps a connection for all its messages.
    messages_per_connection: int = 0
    pipelining: bool = False
    # Connect, and send nothing for `seconds` from when all are connected.
    idle: bool = False
    # Send content in pieces of so many bytes, one each interval; 0 sends it at once.
    drip_bytes: int = 0
    drip_interval_s: float = 1.0
    source_address: str = ""
    tls: bool = False
    ca_file: str = ""
    username: str = ""
    password: str = ""

    def to_json(self) -> str:
        """One line."""
        return json.dumps(asdict(self))


def job_from_json(text: str) -> Job:
    """Return the job; JobError for one without an end."""
    job = Job(**json.loads(text))
    if job.deadline_s <= 0 or not (job.messages or job.seconds):
        raise JobError("a job needs a deadline, and a number of messages or of seconds")
    if job.sessions < 1 or (job.idle and not job.seconds):
        raise JobError("a job needs a session, and an idle one a number of seconds")
    return job
