"""The CameAMP family's config, strategies and factories, by the name that they had on their own."""

from library.automagic_cameamp_refactored import *  # noqa: F403
