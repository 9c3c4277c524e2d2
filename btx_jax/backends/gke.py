"""One JobSet per stage on Google Kubernetes Engine (jobset.x-k8s.io/v1alpha2). If a queue is named,
Kueue admits it.

JobSet restarts a slice as a whole when one of its hosts is preempted; the run resumes from its last
checkpoint. TPU node labels: cloud.google.com/kubernetes-engine/docs, "TPUs in GKE". The pods'
service account grants access to the bucket.
"""

import yaml

from btx_jax.backends.cloud import Place, ask, require
from btx_jax.backends.jobs import CHIPS_PER_HOST, Job, parse_topology

ACCELERATORS = {
    "v4": "tpu-v4-podslice",
    "v5e": "tpu-v5-lite-podslice",
    "v5p": "tpu-v5p-slice",
    "v6e": "tpu-v6e-slice",
}
RESTARTS = 100  # preemptions after which a job fails


class Gke:
    def __init__(self, place: Place):
        self.place = place

    def files(self, job: Job) -> dict[str, str]:
        return {f"{job.name}.yaml": yaml.safe_dump(self._jobset(job), sort_keys=False)}

    def submit(self, job: Job) -> None:
        """Run `kubectl apply`, which leaves a JobSet with the same name and contents unchanged."""
        require(ask(["kubectl", "apply", "-f", "-"], next(iter(self.files(job).values()))))

    def keep(self, job: Job) -> None:
        """Do nothing: JobSet restarts the job."""

    def _jobset(self, job: Job) -> dict:
        name, place = self.place.job_name(job.name), self.place
        hosts, node = 1, {}
        resources: dict = {"requests": {"cpu": "8", "memory": "64Gi"}}
        if job.topology:
            topology = parse_topology(job.topology)
            hosts = topology.hosts
            node = {
                "cloud.google.com/gke-tpu-accelerator": ACCELERATORS[topology.kind],
                "cloud.google.com/gke-tpu-topology": topology.grid,
            }
            resources = {"limits": {"google.com/tpu": min(CHIPS_PER_HOST, topology.chips)}}
        if place.spot:
            node["cloud.google.com/gke-spot"] = "true"
        container = {
            "name": "btx",
            "image": place.image,
            "command": [
                "bash",
                "-c",
                f"exec env {place.shell(job.command)}",
            ],  # exec: SIGTERM reaches the run, which saves its last complete step
            "resources": resources,
        }
        pod = {
            "restartPolicy": "Never",
            "nodeSelector": node,
            "terminationGracePeriodSeconds": 300,
            "serviceAccountName": "btx",
            "containers": [container],
        }
        job_spec = {
            "parallelism": hosts,
            "completions": hosts,
            "completionMode": "Indexed",
            "backoffLimit": 0,
            "template": {"spec": pod},
        }
        metadata: dict = {
            "name": name,
            "annotations": {
                "alpha.jobset.sigs.k8s.io/exclusive-topology": "cloud.google.com/gke-nodepool"
            },
        }
        if place.queue:
            metadata["labels"] = {"kueue.x-k8s.io/queue-name": place.queue}
        return {
            "apiVersion": "jobset.x-k8s.io/v1alpha2",
            "kind": "JobSet",
            "metadata": metadata,
            "spec": {
                "failurePolicy": {"maxRestarts": RESTARTS},
                "replicatedJobs": [
                    {"name": "slice", "replicas": 1, "template": {"spec": job_spec}}
                ],
            },
        }
