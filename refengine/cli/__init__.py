"""The command line: ``refengine info | generate | chat | bench | convert``."""
