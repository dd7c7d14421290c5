"""What the values of an optimization's options must satisfy, said where the option stands."""

from elite.errors import ConfigError


def require(option: str, value: object, holds: bool, rule: str) -> None:
    """Refuse a value.

    Args:
        option: as in `optimizations.OPTION=`.

    Raises:
        ConfigError: the rule does not hold.
    """
    if not holds:
        raise ConfigError(f"optimizations.{option}={value}: {rule}", f"leave optimizations.{option} out for its default")
