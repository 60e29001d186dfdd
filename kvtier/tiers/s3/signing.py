"""Signing requests with botocore's SigV4, over its whole chain of credentials."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import boto3
import botocore.exceptions as boto_errors
from botocore.auth import S3ExpressAuth, S3SigV4Auth
from botocore.awsrequest import AWSRequest
from botocore.config import Config as BotoConfig

from kvtier.config import S3Config
from kvtier.errors import AccessDenied, ConfigError, TierUnavailable
from kvtier.tiers.s3.key_ring import KeyRing

# Blocks and footers carry checksums of their own; SHA-256 over a body would cost half a CPU second a GiB.
_UNSIGNED_BODY = BotoConfig(s3={"payload_signing_enabled": False})


def open_session(config: S3Config) -> boto3.session.Session:
    """Return a session with the configured keys, or with the usual chain.

    Raises:
        AccessDenied: A variable that should hold a key is not set.
    """
    try:
        keys = config.credentials()
    except ConfigError as error:
        raise AccessDenied(str(error)) from error
    return boto3.session.Session(
        aws_access_key_id=keys[0] if keys else None,
        aws_secret_access_key=keys[1] if keys else None,
        region_name=config.region,
    )


class Signer:
    """Signs requests. Thread-safe; whoever waits for credentials holds up nobody else."""

    def __init__(self, keys: KeyRing, *, express: bool):
        """Prepare.

        Args:
            keys: Gives the credentials.
            express: Whether they are those of a session with a directory bucket.
        """
        self._keys = keys
        self._express = express

    async def sign(
        self, method: str, url: str, headers: Mapping[str, str], region: str, seconds: float
    ) -> dict[str, str]:
        """Return `headers` with those of the signature.

        Args:
            method: HTTP method.
            url: The whole URL, percent-encoded.
            headers: What is to be signed; has "Host".
            region: Region of the bucket.
            seconds: How long to wait for credentials at most.

        Raises:
            AccessDenied: There are no credentials.
            TierUnavailable: They cannot be refreshed at present, or not in time.
        """
        request = AWSRequest(method, url, dict(headers))
        request.context["client_config"] = _UNSIGNED_BODY
        try:
            self._auth(await self._keys.get(seconds), region).add_auth(request)
        except (boto_errors.NoCredentialsError, boto_errors.PartialCredentialsError) as error:
            raise AccessDenied(
                f"{error}; set access_key_env and secret_key_env, or the usual AWS credentials"
            ) from error
        except (
            boto_errors.CredentialRetrievalError,
            boto_errors.MetadataRetrievalError,
            # What a process that should print credentials leads to if it is none, or prints something else.
            OSError,
            ValueError,
        ) as error:
            raise TierUnavailable(f"the credentials cannot be refreshed: {error}") from error
        except boto_errors.BotoCoreError as error:
            raise AccessDenied(str(error)) from error
        return dict(request.headers.items())

    def forget(self) -> None:
        """Look the credentials up anew for the next request: the server says that these have expired."""
        self._keys.forget()

    def close(self) -> None:
        """Look no credentials up any more."""
        self._keys.close()

    def _auth(self, keys: Any, region: str) -> Any:
        if not self._express:
            return S3SigV4Auth(keys, "s3", region)
        # The cache is for botocore's own clients, which look sessions up in it.
        return S3ExpressAuth(keys, "s3express", region, identity_cache=None)  # type: ignore[arg-type]
