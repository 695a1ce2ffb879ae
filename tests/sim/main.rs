//! Ring 1: no root, no time.
