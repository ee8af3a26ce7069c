"""Every field that all detector families share, with DETR's published values (arXiv:2005.12872) as defaults.

A family's file starts from `base()`, adds `config.model`, and changes what its paper changes. Any field can be set on
the command line: `--config.data.batch_size=32`. A field that is not here does not exist.
"""

from ml_collections import ConfigDict


def base() -> ConfigDict:
    """The shared fields. Sizes are pixels, rates are per optimiser step unless they say epoch."""
    config = ConfigDict()
    config.seed = 42
    config.precision = "float32"  # float32 | bfloat16: the compute type; parameters stay float32
    config.attention = "auto"  # auto | xla | chunked | cudnn | flash: see models/attention/choice.py
    config.rematerialize = False  # layers compute their activations again in the backward pass: less memory, more work
    config.init_from = ""  # start from a workdir, a checkpoint step, an import_weights output or hf://owner/name

    config.data = ConfigDict()
    config.data.name = "coco_directory"  # shapes | coco_directory (any layout below) | tfds
    config.data.directory = ""  # of pictures, or a prepared TFDS directory; unused by shapes
    # auto | coco | roboflow | one_file | yolo | voc: how files make splits; see docs/own_pictures.md
    config.data.layout = "auto"
    config.data.train_annotations = ""  # empty: as COCO calls them, annotations/instances_train2017.json and train2017,
    config.data.train_images = ""  # or any others whose names have the split's word
    config.data.val_annotations = ""
    config.data.val_images = ""
    config.data.val_share = 0.2  # of pictures that no file divides into splits
    config.data.split_seed = 0  # of that division
    config.data.train_split = "train"
    config.data.eval_split = "validation"
    config.data.prepared_directory = "~/.cache/deperceiver_jax"  # where TFDS keeps what it prepared, once
    config.data.skip_corrupt = False  # True: leave out images that cannot be read, and count them
    # A phone stores its pictures as the sensor lies and notes how to turn them (EXIF). Most annotation tools show them
    # turned, some do not, and the annotated width and height say which. annotated: turned, except where that size fits
    # the stored picture alone; where it does not tell (half turns, mirrors, squares, no size), turned with a warning.
    # apply: all are turned. ignore: none. predict.py turns all, as viewers do.
    config.data.exif_orientation = "annotated"  # annotated | apply | ignore
    config.data.allow_changed = False  # True: a run goes on although its data are not what they were
    config.data.batch_size = 16  # global: over all devices of all hosts
    config.data.num_workers = 4  # loader processes per host; 0 loads in the training process
    config.data.max_boxes = 0  # box slots per image; 0 takes as many as the fullest image needs
    config.data.buckets = 8  # padded sizes that batches come in; each one is compiled once
    config.data.flip_probability = 0.5
    config.data.scales = tuple(range(480, 801, 32))  # short side, drawn uniformly
    config.data.max_size = 1333  # long side at most
    config.data.crop_probability = 0.5
    config.data.crop_scales = (400, 500, 600)  # short side before the crop
    config.data.crop_min = 384
    config.data.crop_max = 600
    config.data.paste_objects = 0  # up to so many small objects from pictures of the batch are pasted into each
    config.data.paste_max_side = 32.0  # longer side of a small object, in pixels of the output
    config.data.eval_buckets = 4  # padded sizes of evaluation batches
    config.data.eval_scale = 800
    config.data.eval_max_size = 1333

    config.loss = ConfigDict()
    config.loss.classification = "softmax_no_object"  # softmax_no_object | sigmoid_focal | sigmoid_iou_aware
    config.loss.no_object_weight = 0.1
    config.loss.focal_alpha = 0.25  # focal: weight of the true class; IoU-aware: the score's share in its target
    config.loss.focal_gamma = 2.0  # how fast the loss of easy logits fades
    config.loss.weight_class = 1.0
    config.loss.weight_bbox = 5.0
    config.loss.weight_giou = 2.0
    config.loss.auxiliary = True  # every decoder layer is trained, not only the last

    config.matcher = ConfigDict()
    config.matcher.backend = "scipy"  # scipy (on each host) | device (all that jax 0.10 caches)
    config.matcher.cost_class = 1.0
    config.matcher.cost_bbox = 5.0
    config.matcher.cost_giou = 2.0

    config.optimizer = ConfigDict()
    config.optimizer.name = "adamw"  # adamw | muon (matrices by Muon, the rest by AdamW; learns faster from nothing)
    config.optimizer.learning_rate = 1e-4
    config.optimizer.weight_decay = 1e-4
    config.optimizer.b1 = 0.9
    config.optimizer.b2 = 0.999
    config.optimizer.eps = 1e-8
    config.optimizer.clip_norm = 0.1  # global L2 norm of the gradient; 0 does not clip
    config.optimizer.schedule = "step"  # step | cosine
    config.optimizer.drop_epochs = (200,)  # the rate is multiplied by drop_factor after each of these epochs
    config.optimizer.drop_factor = 0.1
    config.optimizer.warmup_steps = 0
    config.optimizer.accumulate_steps = 1  # a batch is gone through in so many parts whose gradients add up
    config.optimizer.ema_decay = 0.0  # 0 keeps no moving average; evaluation uses the average where there is one
    # Parameters by path: every one must match exactly one group, whose multiplier scales its learning rate.
    config.optimizer.groups = ConfigDict(
        {
            "backbone": {"pattern": r"^backbone/", "multiplier": 0.1},
            "rest": {"pattern": r"^(?!backbone/)", "multiplier": 1.0},
        }
    )

    config.train = ConfigDict()
    config.train.num_epochs = 300
    config.train.num_steps = 0  # 0: num_epochs decides
    config.train.log_every = 50  # steps
    config.train.eval_every = 0  # steps; 0: after every epoch; -1: only after the last step
    config.train.checkpoint_every = 0  # steps; 0: after every epoch; -1: only after the last step
    config.train.keep_checkpoints = 2  # the newest ones; the best by AP is kept beside them
    # 8: trains on eight pictures, without augmentation, until they are learned, and says why if they are not
    config.train.overfit = 0
    config.train.patience = 0  # a run ends when AP has not risen in so many evaluations; 0: never before its time
    config.train.trackers = ()  # of wandb, mlflow and trackio, beside metrics.jsonl and TensorBoard
    config.train.compilation_cache = "~/.cache/deperceiver_jax/compiled"  # empty: none

    config.eval = ConfigDict()
    config.eval.batch_size = 8  # global; on more devices, the next multiple of them
    config.eval.max_detections = 100  # per image
    config.eval.max_detections_per_class = 100  # of an image that the metric counts; 100 in every published table
    # Views of each picture beside the whole at data.eval_scale; predict.py's, too. See docs/evaluation.md
    config.eval.flip = False  # all of them mirrored, too
    config.eval.scales = ()  # further short sides in pixels, as in (640, 960)
    config.eval.tiles = ConfigDict()
    config.eval.tiles.size = 0  # side of square tiles, in pixels of the stored picture; 0: none
    config.eval.tiles.overlap = 0.25  # of neighbours, at least this share of a tile
    config.eval.merge_iou = 0.6  # from which overlap on boxes of several views are one object
    config.eval.score_threshold = 0.0  # of what is evaluated and written; the published tables leave out nothing

    config.mesh = ConfigDict()
    config.mesh.model = 1  # devices over which parameters, moments and averages are split; changes no number
    return config


def resnet(depth: int = 50) -> ConfigDict:
    """`config.model.backbone`, the same for all families."""
    b = ConfigDict()
    b.depth = depth  # 18 | 34 | 50 | 101
    b.width = 64  # channels of the stem; stages have 1, 2, 4, 8 times as many
    b.norm = "frozen_batch_norm"  # frozen_batch_norm (pretrained: needs weights) | group_norm (from scratch)
    b.frozen_stages = 2  # the stem and the first stage; 0 trains everything, 5 nothing
    b.dilation = False  # DC5: the last stage keeps stride 16
    # ResNeXt, with bottlenecks (depth 50 or 101): 64 and 4 for 64x4d, 32 and 2 for 32x4d, 32 and 4 for 32x8d
    b.groups = 1  # of the 3x3 convolutions
    b.inner_ratio = 1  # of their channels to those of a ResNet
    b.deformable_stages = 0  # of the last stages, whose 3x3 convolutions are deformable (DCN v2), with bottlenecks
    # A ResNet or ResNeXt of torchvision or timm: a .pth, a .safetensors, or a name of the hub. This is torchvision's
    # first, from which the published detectors were trained. Unused with init_from, and with group_norm.
    b.weights = f"hf://timm/resnet{depth}.tv_in1k"
    return b


def resnext101() -> ConfigDict:
    """A ResNeXt-101 64x4d with torchvision's weights."""
    b = resnet(101)
    b.update(groups=64, inner_ratio=4, weights="hf://timm/resnext101_64x4d.tv_in1k")
    return b
