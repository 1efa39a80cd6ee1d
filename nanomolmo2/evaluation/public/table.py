"""The public benchmarks: one table of facts about their files."""

from __future__ import annotations

from nanomolmo2.evaluation.public import questions
from nanomolmo2.evaluation.public.benchmark import PublicBenchmark
from nanomolmo2.evaluation.public.files import JsonFiles, ParquetFiles
from nanomolmo2.registry import Registry

_IMAGE = ("image",)
_QUESTION = ("question",)
_ANSWERS = ("answers",)
_CHOICE = (("question_type",), ("options",), _QUESTION, ("answer",), ("image_1",))
_SCREENS = {"image": ("screenspotv2_image/{img_filename}", "images/{img_filename}")}
_BOXES = (("instruction",), ("bbox",), _IMAGE)
_TARGETS = ("data_type", "ui_type", "data_source", "img_filename", "file_name", "group")

_BENCHMARKS = (
    # ---- short answers ----
    PublicBenchmark(
        "chartqa",
        "ChartQA",
        questions.chartqa,
        (
            JsonFiles(
                (("{split}_human.json",), ("{split}_augmented.json",)),
                {"image": ("png/{imgname}", "{split}/png/{imgname}")},
                ("query", "label", "imgname"),
            ),
            ParquetFiles(
                (("query", "question"), ("label", "answer"), _IMAGE),
                ("type", "human_or_machine"),
            ),
        ),
        ("test", "val", "train"),
    ),
    PublicBenchmark(
        "docvqa",
        "DocVQA",
        questions.docvqa,
        (
            JsonFiles(
                (("{split}_v1.0_withQT.json", "{split}_v1.0.json"),),
                {"image": ("{image}", "spdocvqa_images/{image_name}", "{image_name}")},
                ("question", "image"),
                "data",
            ),
            ParquetFiles((_QUESTION, _ANSWERS, _IMAGE), inside="(?!.*info).*"),
        ),
        ("val", "train"),
    ),
    PublicBenchmark(
        "infovqa",
        "InfographicVQA",
        questions.infovqa,
        (
            JsonFiles(
                (("infographic*VQA_{split}_v1.0*.json",),),
                {
                    "image": (
                        "images/{image_local_name}",
                        "infographicsvqa_images/{image_local_name}",
                        "{image_local_name}",
                    )
                },
                ("question", "image_local_name"),
                "data",
            ),
            ParquetFiles((_QUESTION, _ANSWERS, _IMAGE), inside=".*info.*"),
        ),
        ("val", "train"),
    ),
    PublicBenchmark(
        "textvqa",
        "TextVQA",
        questions.textvqa,
        (
            JsonFiles(
                (("TextVQA_0.5*_{split}.json",),),
                {"image": ("train_images/{image_id}.jpg", "test_images/{image_id}.jpg")},
                ("question", "image_id"),
                "data",
            ),
            ParquetFiles((_QUESTION, _ANSWERS, _IMAGE)),
        ),
        ("val", "train"),
    ),
    PublicBenchmark(
        "vqav2",
        "VQA v2",
        questions.vqav2,
        (
            JsonFiles(
                (("v2_OpenEnded_mscoco_{split}2014_questions.json",),),
                {"image": ("{split}2014/COCO_{split}2014_{image_id:012d}.jpg",)},
                ("question", "question_id", "image_id"),
                "questions",
                "v2_mscoco_{split}2014_annotations.json",
            ),
            ParquetFiles((_QUESTION, _ANSWERS, _IMAGE), ("answer_type",)),
        ),
        ("val", "train"),
    ),
    PublicBenchmark(
        "realworldqa",
        "RealWorldQA",
        questions.realworldqa,
        (ParquetFiles((_QUESTION, ("answer",), _IMAGE), any_name=True),),
        ("test",),
    ),
    # ---- multiple choice ----
    PublicBenchmark(
        "aokvqa",
        "A-OKVQA",
        questions.aokvqa,
        (
            JsonFiles(
                (("aokvqa_v1p0_{split}.json",),),
                {"image": ("{split}2017/{image_id:012d}.jpg", "{image_id:012d}.jpg")},
                ("question", "choices", "image_id"),
            ),
            ParquetFiles((_QUESTION, ("choices",), ("correct_choice_idx",), _IMAGE)),
        ),
        ("val", "train"),
    ),
    PublicBenchmark(
        "ai2d",
        "AI2D",
        questions.ai2d,
        (ParquetFiles((_QUESTION, ("options",), ("answer",), _IMAGE), any_name=True),),
        ("test",),
    ),
    PublicBenchmark(
        "mmmu",
        "MMMU",
        questions.mmmu,
        (ParquetFiles(_CHOICE, ("id",)),),
        ("val", "dev"),
    ),
    # ---- counts ----
    PublicBenchmark(
        "countbenchqa",
        "CountBenchQA",
        questions.countbenchqa,
        (ParquetFiles((_QUESTION, ("number",), _IMAGE), any_name=True),),
        ("test",),
    ),
    PublicBenchmark(
        "pixmo_count",
        "PixMo-Count",
        questions.pixmo_count,
        (
            ParquetFiles(
                (("label", "question"), ("count", "answer"), ("image_url", "image")),
                ("image_sha256",),
            ),
        ),
        ("test", "val", "train"),
    ),
    # ---- points ----
    PublicBenchmark(
        "pointbench",
        "Point-Bench",
        questions.pointbench,
        (
            JsonFiles(
                (("data.json",),),
                {
                    "image": (
                        "selected_images/{category}/{image_filename}",
                        "selected_images/{image_filename}",
                    ),
                    "mask": (
                        "selected_masks/{category}/{mask_filename}",
                        "selected_masks/{mask_filename}",
                    ),
                },
                ("user_input", "category", "image_filename"),
                only_with="mask_filename",
            ),
        ),
        ("test",),
    ),
    PublicBenchmark(
        "screenspot_v2",
        "ScreenSpot-v2",
        questions.screenspot_v2,
        (
            JsonFiles(
                tuple(
                    (f"screenspot_{platform}_v2.json",) for platform in ("desktop", "web", "mobile")
                ),
                _SCREENS,
                ("instruction", "bbox", "img_filename"),
            ),
            ParquetFiles(_BOXES, _TARGETS, any_name=True),
        ),
        ("test",),
    ),
    PublicBenchmark(
        "screenspot_pro",
        "ScreenSpot-Pro",
        questions.screenspot_pro,
        (
            JsonFiles(
                (("annotations/*.json",),), _SCREENS, ("instruction", "bbox", "img_filename")
            ),
            ParquetFiles(_BOXES, _TARGETS, any_name=True),
        ),
        ("test",),
    ),
)

PUBLIC: Registry[PublicBenchmark] = Registry(**{one.name: one for one in _BENCHMARKS})
