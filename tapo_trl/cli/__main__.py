# Copyright 2026 The tapo_trl authors
# SPDX-License-Identifier: Apache-2.0

import sys

from .main import main


if __name__ == "__main__":
    sys.exit(main())
