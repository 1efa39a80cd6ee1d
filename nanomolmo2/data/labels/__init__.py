"""Labels of other programs -> records of ours, and predictions -> what those programs read.

coco.py label_studio.py cvat.py yolo.py fiftyone.py table.py     a file -> `Labelled` pictures
pictures.py     names of pictures -> files; where a pixel of the labels lies in them
labelled.py     what is known of a picture, and what was dropped
shapes.py       masks, polygons, ellipses: a point that lies inside
questions.py    `Labelled` -> a record with questions, answers and truth
importing.py    all of it: `import_labels`
export.py       predictions -> COCO and Label Studio: `export_predictions`
"""
