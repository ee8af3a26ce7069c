#!/bin/bash
# Two slices of 16 chips of TPU v5e by xpk (pip install xpk), in a cluster that `xpk cluster create` has made.
# IMAGE is that of launch/Dockerfile; every host copies the data before it trains.
set -euo pipefail

xpk workload create \
  --cluster=my-cluster --project=my-project --zone=us-west4-a \
  --workload=deperceiver --tpu-type=v5litepod-16 --num-slices=2 --max-restarts=100 \
  --docker-image=IMAGE \
  --command="deperceiver data prepare /data/coco --from=gs://my-bucket/coco && \
exec deperceiver train --config=detr:r50 --workdir=gs://my-bucket/runs/detr \
--config.data.directory=/data/coco --config.data.batch_size=256 \
--config.precision=bfloat16 --config.matcher.backend=device \
--config.model.backbone.weights=gs://my-bucket/resnet50.pth --stopped_status=75"
