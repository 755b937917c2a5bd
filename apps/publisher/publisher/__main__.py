"""Serve, once the settings are known to be good: `python3 -m publisher`.

They are checked before granian starts, because granian would respawn workers that fail on them
for as long as two of them fail in turn. Nothing here may import door.web: this process becomes
granian's own, and would count in the metrics as a worker that never connects.
"""

import os
import sys

from door.environment import ConfigError, Environment

from publisher.settings import Settings

SERVER = ["-m", "granian", "--interface", "wsgi", "--factory", "publisher.app:create_app"]

if __name__ == "__main__":
    try:
        Settings.read(Environment())
    except ConfigError as error:
        sys.exit(f"publisher: {error}")
    os.execv(sys.executable, [sys.executable, *SERVER])  # noqa: S606 - no shell is wanted
