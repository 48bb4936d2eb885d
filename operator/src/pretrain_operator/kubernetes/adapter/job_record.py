"""The job's own object: its spec as last heard, its status as last written."""

from __future__ import annotations

import math
from typing import Any, cast

from pretrain_api.messages.profile_request import ANNOTATION, InvalidRequest, ProfileRequest, read_request
from pretrain_api.spec.job import API_VERSION, KIND, PretrainJob
from pretrain_api.status.job import JobStatus
from pretrain_operator.kubernetes.client.api import JOBS, Api, ApiError, Object
from pretrain_operator.kubernetes.client.refusals import Gone
from pretrain_operator.kubernetes.workload.settings import PodSettings
from pretrain_operator.kubernetes.workload.validation import InvalidSpec, parse_job, parse_status


class JobRecord:
    """The one writer of a job's status. What it wrote last is the status; what the object says of it is not read again.

    Raises InvalidSpec when it is made from an object whose spec can't be acted on."""

    def __init__(self, api: Api, body: Object, settings: PodSettings) -> None:
        metadata = body["metadata"]
        self._api = api
        self._settings = settings
        self._namespace: str = metadata["namespace"]
        self._name: str = metadata["name"]
        self.uid: str = metadata["uid"]
        self._version: str = metadata["resourceVersion"]
        self._generation: int = metadata["generation"]
        self.job: PretrainJob = parse_job(body, settings)
        """The last one that was in order."""
        self.invalid = ""
        """What is wrong with the newest one."""
        self.stopping = "deletionTimestamp" in metadata
        self.profile = _profile_asked_for(metadata)
        """By an annotation."""
        self.status: JobStatus = parse_status(body)

    def learn(self, body: Object) -> bool:
        """Take in the object as the API server sent it; False: nothing new that matters. Older ones are ignored."""
        metadata = body["metadata"]
        if metadata["uid"] != self.uid or not _is_newer(metadata["resourceVersion"], self._version):
            return False
        self._version = metadata["resourceVersion"]
        before = self._generation, self.stopping, self.profile
        self.stopping = "deletionTimestamp" in metadata
        self.profile = _profile_asked_for(metadata)
        if metadata["generation"] != self._generation:
            self._generation = metadata["generation"]
            try:
                self.job, self.invalid = parse_job(body, self._settings), ""
            except InvalidSpec as error:
                self.invalid = str(error)
        return before != (self._generation, self.stopping, self.profile)

    async def write_status(self, status: JobStatus) -> bool:
        """Replace the status, whoever wrote to the object meanwhile; True: something new was learnt on the way.
        Raises Gone when there is no such job any more, ApiError when it is to be tried again."""
        try:
            learnt = self.learn(await self._put(status))
        except ApiError as error:
            if error.status == 404:
                raise self._gone() from error
            if error.status != 409:
                raise
            newest = await self._newest()
            learnt = self.learn(newest)
            self._version = newest["metadata"]["resourceVersion"]
            learnt = self.learn(await self._put(status)) or learnt
        self.status = status
        return learnt

    async def delete(self) -> None:
        """Delete the job; what it owns goes with it. That it is gone is success."""
        await self._api.delete(JOBS, self._namespace, self._name, uid=self.uid)

    async def _put(self, status: JobStatus) -> Object:
        """The API server takes the status only. No other job of this name ever has this resource version."""
        shown = for_columns(status).model_dump(mode="python", by_alias=True, exclude_none=True)
        written = cast(Object, without_nan(shown))
        body: Object = {
            "apiVersion": API_VERSION,
            "kind": KIND,
            "metadata": {"name": self._name, "namespace": self._namespace, "resourceVersion": self._version},
            "status": written,
        }
        return await self._api.replace(JOBS, self._namespace, self._name, body, subresource="status")

    async def _newest(self) -> Object:
        try:
            body = await self._api.get(JOBS, self._namespace, self._name)
        except ApiError as error:
            if error.status == 404:
                raise self._gone() from error
            raise
        if body["metadata"]["uid"] != self.uid:
            raise self._gone()
        return body

    def _gone(self) -> Gone:
        return Gone(f"PretrainJob {self._namespace}/{self._name} no longer exists")


def for_columns(status: JobStatus) -> JobStatus:
    """The status with the numbers that `kubectl get` prints as they are cut to what a person reads."""
    goodput = status.goodput
    return status.model_copy(
        update={
            "loss": None if status.loss is None else round(status.loss, 6),
            "tokens_per_second": None if status.tokens_per_second is None else round(status.tokens_per_second, 1),
            "mfu": None if status.mfu is None else round(status.mfu, 4),
            "goodput": goodput and goodput.model_copy(update={"ratio": round(goodput.ratio, 4)}),
        }
    )


def without_nan(value: Any) -> Any:
    """JSON that the API server takes: it knows neither NaN nor infinity, nor keys that are numbers."""
    if isinstance(value, dict):
        members = cast(dict[object, Any], value)
        return {str(key): without_nan(item) for key, item in members.items() if not _is_nan(item)}
    if isinstance(value, list | tuple):
        return [without_nan(item) for item in cast(list[Any], value) if not _is_nan(item)]
    return value


def _profile_asked_for(metadata: Object) -> ProfileRequest | InvalidRequest | None:
    annotations = cast(dict[str, str], metadata.get("annotations") or {})
    return read_request(annotations.get(ANNOTATION, ""))


def _is_nan(value: object) -> bool:
    return isinstance(value, float) and not math.isfinite(value)


def _is_newer(version: str, than: str) -> bool:
    """Resource versions are numbers that rise; what is no number is not compared, but believed."""
    if version.isdecimal() and than.isdecimal():
        return int(version) > int(than)
    return version != than
