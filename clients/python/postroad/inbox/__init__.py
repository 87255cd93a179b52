"""The inbox: a local SMTP server that keeps whatever it is sent, to look at and to judge by.

`python -m postroad.inbox` receives (`server.py`); `Inbox` stores and reads the folder (`store.py`), so that
`postroad inbox list` and the tests work whether or not the server runs.
"""

from __future__ import annotations

from postroad.inbox.store import Inbox, InboxError, ReceivedMail

__all__ = ["Inbox", "InboxError", "ReceivedMail"]
