"""Build DeepSpeed's operators for NVMe offload into this Python environment (`make setup-nvme`).

    python tools/setup_nvme.py

Needs a C++ compiler and libaio's headers (apt-get install libaio-dev, dnf install libaio-devel); about a minute on two
cores. What is built already stays. Exit codes: 0 they are there; 2 they can't be built, with the reason.
"""

from __future__ import annotations

import sys

from megagpt2.config.errors import ConfigError
from megagpt2.parallel import nvme


def main() -> int:
    try:
        files = nvme.build()
        nvme.load_operators()
    except ConfigError as error:
        print(f"setup_nvme: {error}", file=sys.stderr)
        return 2
    print(f"NVMe operators: {', '.join(map(str, files))}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
