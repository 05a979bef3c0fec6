# SPDX-License-Identifier: Apache-2.0
"""Every field that exists, with its default; another configuration only changes values found here.

Choose and override on the command line: --config=configs/demo.py --config.llm.depth=4
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    c = ConfigDict()
    c.seed = 0  # parameters, data order and sampling all derive from it

    # Devices: -1 takes what the other two axes leave.
    c.mesh = ConfigDict()
    c.mesh.data = -1
    c.mesh.fsdp = 1
    c.mesh.tensor = 1

    # Vision encoder, CLIP- or SigLIP-style.
    c.vit = ConfigDict()
    c.vit.image_size = 336  # pixels, square
    c.vit.patch_size = 14  # pixels
    c.vit.depth = 24  # blocks of the published model; only those up to the last level are run
    c.vit.width = 1024
    c.vit.mlp = 4096
    c.vit.heads = 16
    c.vit.norm_eps = 1e-5
    c.vit.levels = (12, 16, 22, 23)  # blocks whose outputs are kept; the last is "the" feature
    c.vit.activation = "quick_gelu"  # vlm_jax/layers.py ACTIVATIONS names the kinds
    c.vit.class_token = True  # a learned token stands before the patches (CLIP; not SigLIP)
    c.vit.keep_class = False  # and becomes the first visual token; compressor.kind="none" only
    c.vit.patch_bias = False  # of the convolution that cuts the image (SigLIP)
    c.vit.pre_norm = True  # a norm before the first block (CLIP)
    c.vit.final_norm = False  # the last block's output goes through the norm behind it
    c.vit.cut_border = False  # pixels at the right and bottom that fill no patch are left out

    # Llama/Qwen-style decoder.
    c.llm = ConfigDict()
    c.llm.vocab = 32000
    c.llm.depth = 32
    c.llm.width = 4096
    c.llm.mlp = 11008
    c.llm.heads = 32
    c.llm.kv_heads = 32
    c.llm.head_size = 128
    c.llm.rope_theta = 1e4
    c.llm.norm_eps = 1e-5
    c.llm.qkv_bias = False
    c.llm.tied_embeddings = False
    c.llm.qk_norm = False  # each head's query and key normalized before the rotation (Qwen3)
    # Stretched rotary positions, as `rope_scaling` of a published config.json says.
    c.llm.rope_kind = "default"  # vlm_jax/models/rope.py KINDS names the kinds
    c.llm.rope_factor = 1.0
    c.llm.rope_low_frequency = 1.0  # llama3: turns in original_length that count as slow, and as
    c.llm.rope_high_frequency = 4.0  # fast
    c.llm.rope_original_length = 8192  # llama3: tokens of the model before it was stretched

    # Visual-token compressor: vlm_jax/compressors COMPRESSORS names the kinds.
    c.compressor = ConfigDict()
    c.compressor.kind = "token_packer"
    # V, visual tokens handed to the LLM; 0: as many as each image needs (prumerge, prumerge_plus).
    # mqt, m3, the selections and what is trained with `elastic` serve several V: there it is the V
    # of requests alone.
    c.compressor.tokens = 36
    c.compressor.heads = 8  # of the cross-attention, as published for windows; mqt has 16
    # quecc: where the question's feature comes from. "separate": an LLM pass over it alone (as
    # published); "prefix": the LLM's own pass over the text before the image, read once; "none".
    c.compressor.query = "separate"
    c.compressor.downsample = "conv"  # quecc: a window's query by "conv" (published) or "pool"
    c.compressor.queries = 0  # mqt: learned queries; 0: 256, or one per patch of a smaller grid
    c.compressor.prefusion = 4  # llava_mini: layers in which the text reads all patches
    # pool, quecc with downsample "pool", token_packer: every V of which each step of align and
    # finetune runs one, so that one model serves them all; (): the model has the one V.
    c.compressor.elastic = ()
    c.compressor.scales = ()  # m3: every V that training shows; (): 1, 9, 36, 144, 576 of 24 x 24
    c.compressor.important_ratio = 0.5  # vispruner: share of V chosen by attention; 1 is FasterVLM
    c.compressor.selection_seed = 0  # random: with the image's pixels it draws the patches
    c.compressor.ps_version = "v2"  # pixel_unshuffle: InternVL's; "v1" transposes the tokens' grid
    # cdpruner: CLIP's text tower, as in clip-vit-large-patch14-336, and the width of CLIP's space.
    c.compressor.clip_width = 768
    c.compressor.text_width = 768
    c.compressor.text_depth = 12
    c.compressor.text_heads = 12
    c.compressor.text_vocab = 49408
    c.compressor.text_length = 77

    # Visual tokens that the LLM leaves out between its layers, or of clips before it, in generation
    # and evaluation alone: vlm_jax/models/pruning PRUNINGS names the kinds; "none" leaves none out.
    c.pruning = ConfigDict()
    c.pruning.kind = "none"
    c.pruning.layers = ()  # layers that run before each cut; (): as published
    c.pruning.tokens = ()  # visual tokens that are kept after each; (): as published, if it says so
    c.pruning.weight = 0.5  # tokencarve: of the rank by attention; the rest is of singular values
    c.pruning.dropped = 0.0  # evs: share of a clip's tokens, those most like the frame before

    # LoRA (arXiv 2106.09685): finetune trains low-rank updates of the LLM's linear layers in place
    # of its weights; the compressor is trained as ever. There is no dropout.
    c.lora = ConfigDict()
    c.lora.rank = 0  # r; 0: no adapters
    c.lora.alpha = 16.0  # an update is alpha / r A B
    c.lora.targets = ()  # vlm_jax/models/lora.py TARGETS names the layers; (): all seven

    # A folder of `vlm-jax convert`, of a finished `vlm-jax train` or of a grid's cell: its encoder,
    # LLM and tokenizer replace the fields above, its weights are the first. "": random weights.
    c.start_from = ""

    # Numbers.
    # Of activations and matmuls; parameters, norms, softmax and loss are float32.
    c.compute_dtype = "bfloat16"
    c.remat = "full"  # what the backward pass recomputes: none, dots, full
    # Of the weights that a stage leaves alone: float32, or bfloat16 for the encoder's and LLM's
    # matrices. With bfloat16 activations a step computes the same from either.
    c.frozen_dtype = "float32"
    # Positions of a row whose scores over the vocabulary are there at a time in training, and made
    # twice. 0: all of a row, made once; -1: all where a device's scores stay under 268 MB.
    c.loss_chunk = -1
    c.kernels = "auto"  # attention by "pallas" (TPU alone) or "xla"; "auto" by the devices

    # Data.
    c.data = ConfigDict()
    c.data.source = "llava"  # vlm_jax/data/sources.py SOURCES names the kinds
    # llava: the JSON file; tars: a tar, a folder of them, or names with {000..012} or *; tfds: a
    # folder of `vlm-jax data build`; nlvr: the folder that holds train and evaluation splits.
    c.data.path = ""
    c.data.images = ""  # llava: the folder that image paths are relative to
    # mixture: ("NAME", weight, {fields of data that differ}) for each part, such as
    # (("chat", 3, {"path": "chat.json"}), ("captions", 1, {"source": "tars", "path": "cc.tar"})).
    c.data.mixture = ()
    # A folder that transformers can load; "" trains a word-level one on the source.
    c.data.tokenizer = ""
    c.data.template = "vicuna_v1"  # vlm_jax/data/templates.py TEMPLATES names the kinds
    c.data.image_fit = "pad"  # how an image becomes square: pad, crop, stretch
    c.data.image_mean = (0.48145466, 0.4578275, 0.40821073)  # red, green, blue; CLIP's
    c.data.image_std = (0.26862954, 0.26130258, 0.27577711)
    c.data.image_resample = "bicubic"  # or nearest, lanczos, bilinear, box, hamming
    # (): to the encoder's side. (a,): the shorter side to a with "crop", both sides otherwise; (0,)
    # not at all; the middle is cut out after it. (a, b): vlm_jax/data/images.py Preparation.
    c.data.image_resize = ()
    c.data.image_rescale = 1 / 255  # of the numbers from 0 to 255, before mean and deviation
    c.data.image_normalize = True  # False: mean and deviation are not used
    c.data.image_exif = "ignore"  # or "apply": turn an image as its EXIF orientation says
    c.data.text_length = 512  # T, text tokens per row; longer rows are cut
    # Tokens of the question that a compressor reads; with compressor.query "prefix" of all text
    # before the image, and text_length - question_length tokens may follow it.
    c.data.question_length = 64
    # M, most images of a row, each V tokens at its mark. Rows with fewer cost as much: the encoder
    # and the LLM's row of text_length + M V tokens are the same for all.
    c.data.images_per_row = 1
    # T, frames taken of each clip (rows with `video`) at even places: a clip is T images at one
    # mark, and counts as one in images_per_row. 0: rows with a clip are bad rows.
    c.data.frames = 0
    # Packed rows hold several examples, which do not see each other; `batch` of a stage then counts
    # rows. Not with compressor.query="prefix".
    c.data.row_length = 0  # tokens of a packed row, text and visual; 0: one example a row
    c.data.row_images = 8  # most images of a packed row, each encoded whether it is there or not
    # Batches of like length, such as (256, 512, 1024), with images or without: rows of one example,
    # as long as the first of these that holds them all, or as text_length. Each shape is compiled.
    c.data.buckets = ()
    c.data.on_bad_example = "fail"  # or "skip": counted and reported
    c.data.text_only = False  # accept rows without an image
    c.data.blind = False  # replace every image by the mean image: the blind baseline
    c.data.workers = 0  # grain worker processes; 0 reads in this process
    # What the embedded benchmark makes (source "synthetic"); splits never share a scene.
    c.data.train_images = 12000
    c.data.val_images = 500
    c.data.test_images = 1500
    # Most questions about an image that are turns of one training row, in a drawn order; 0: all.
    # What is evaluated stays one question a row.
    c.data.questions_per_row = 1
    # Its third family: the share of its images that show pictures of things that people know, and
    # the folder with their packages, as `vlm-jax data fetch pictures` prints it. 0.0: none.
    c.data.picture_share = 0.0
    c.data.pictures = ""
    # Its fourth: the share of its images that are short clips, of which data.frames are taken.
    c.data.video_share = 0.0
    c.data.held_out_style = "facebook"  # google, twitter or facebook: tested on, not trained on

    # Stages. encoder trains an encoder from nothing on what each patch shows (small models; 0
    # steps: keep the one that is there), align the compressor, finetune the compressor and the LLM.
    for name, rate in (("encoder", 1e-3), ("align", 1e-3), ("finetune", 2e-5)):
        stage = c[name] = ConfigDict()
        stage.steps = 0 if name == "encoder" else 1000
        stage.batch = 128  # examples per optimizer step, all devices together
        stage.accumulate = 1  # micro-batches per optimizer step; must divide batch
        stage.learning_rate = rate  # peak
        stage.compressor_rate = 1.0  # that of the compressor, as a multiple of learning_rate
        stage.warmup = 0.03  # fraction of steps
        stage.weight_decay = 0.0
        stage.beta1 = 0.9
        stage.beta2 = 0.999
        stage.epsilon = 1e-8
        # Adam's two means for each parameter: float32 (8 bytes), bfloat16 (4), or factored: squares
        # by rows and columns, as Adafactor's (2; beta2 and epsilon are not read).
        stage.moments = "float32"
        stage.clip_norm = 0.0  # global gradient norm; 0 does not clip
        stage.z_loss = 0.0  # weight of log(Z)^2
        # Steps in a row whose loss or gradient is not finite that end the run; the updates of such
        # steps are never made.
        stage.max_nonfinite = 3

    # A second objective of the encoder stage, for data that names what its patches show (the
    # embedded benchmark's pictures): patches near the names of their things, as in CLIP.
    c.contrast = ConfigDict()
    c.contrast.weight = 0.0  # of its loss, beside that of the patch classes; 0.0: there is none
    c.contrast.width = 64  # of the space in which patches and names are compared

    # Checkpoints and the log.
    c.checkpoint = ConfigDict()
    c.checkpoint.every = 500  # steps
    c.checkpoint.keep = 2
    c.log = ConfigDict()
    c.log.every = 20  # steps
    c.log.tensorboard = False

    # Validation while align and finetune are trained, on examples that they do not see.
    c.eval_every = 0  # steps; 0: never. Before the first step and after the last one, too
    c.validation = ConfigDict()
    c.validation.split = "val"  # of the data; data.path then has {split} in it
    c.validation.hold_out = 0  # at least so many examples of the training data instead of a split
    c.validation.examples = 512  # at most so many for the loss
    # At most so many are answered and scored; 0: none. The LLM's weights are there twice meanwhile.
    c.validation.answers = 64

    # Evaluation and generation.
    c.evaluate = ConfigDict()
    c.evaluate.batch = 64
    c.evaluate.split = "test"
    c.evaluate.max_new_tokens = 16

    # A scaling run: every LLM x visual-token count x seed, with one shared frozen encoder.
    c.grid = ConfigDict()
    # name -> the llm fields that differ from c.llm. Beside them `start_from`, a folder whose LLM
    # and tokenizer are taken (the encoder is the grid's), and dicts with the fields that differ of
    # lora, align, finetune and of data (tokenizer, template, text_length, question_length,
    # buckets).
    c.grid.llms = ConfigDict()
    c.grid.tokens = (1, 4, 16, 36)
    c.grid.seeds = (0,)
    # Numbers of frames that are taken of each clip, such as (1, 4, 8): each a cell, instead of
    # data.frames. Every row of the data is then a clip.
    c.grid.frames = ()
    # Further cells: kind ("blind" or a compressor), tokens, and a dict of further fields of
    # `compressor` if any, such as ("quecc", 4, {"query": "prefix"}).
    c.grid.baselines = ()
    return c.lock()  # a name that is not here is an error wherever it is set
