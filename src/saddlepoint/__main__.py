"""`python -m saddlepoint` is the command `saddlepoint`."""

from saddlepoint.cli import main

raise SystemExit(main())
