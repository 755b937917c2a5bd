"""Serve, once the settings are known to be good: `python3 -m publisher`.

They are checked before granian starts, because granian would respawn workers that fail on them
for as long as two of them fail in turn.
"""

import os
import sys

from door.settings import ConfigError, Environment

from publisher.settings import Settings

SERVER = ["-m", "granian", "--interface", "wsgi", "--factory", "publisher:create_app"]

if __name__ == "__main__":
    try:
        Settings.read(Environment())
    except ConfigError as error:
        sys.exit(f"publisher: {error}")
    os.execv(sys.executable, [sys.executable, *SERVER])  # noqa: S606 - no shell is wanted
