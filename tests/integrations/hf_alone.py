"""Use an exported model where Cobra is not installed: `python hf_alone.py TASK.json`; answers go to standard output."""

import json
import sys
from pathlib import Path


class NotInstalled:
    """Refuses to import `cobra`."""

    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "cobra":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)


sys.meta_path.insert(0, NotInstalled())

from transformers import AutoModel, AutoModelForImageTextToText, AutoProcessor, pipeline  # noqa: E402


def main() -> None:
    task = json.loads(Path(sys.argv[1]).read_text())
    folder, limit = task["folder"], task["max_new_tokens"]
    model = AutoModelForImageTextToText.from_pretrained(folder, trust_remote_code=True).eval()
    processor = AutoProcessor.from_pretrained(folder, trust_remote_code=True)
    chats = []
    for image, question in zip(task["images"], task["questions"], strict=True):
        content = [{"type": "image", "path": image}, {"type": "text", "text": question}]
        chats.append([{"role": "user", "content": content}])
    inputs = processor.apply_chat_template(
        chats,
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
        processor_kwargs={"padding": True},
    )
    length = inputs["input_ids"].shape[1]
    ids = model.generate(**inputs, max_new_tokens=limit)[:, length:]
    uncached = model.generate(**inputs, max_new_tokens=limit, use_cache=False)[:, length:]
    # as lmms-eval's generic wrapper calls a processor
    raw = processor(
        text=["<image>" + task["raw_prompt"]], images=[task["images"][0]], videos=[], audios=[], return_tensors="pt"
    )
    beams = model.generate(**raw, max_new_tokens=limit, num_beams=2)[0, raw["input_ids"].shape[1] :]
    pipe = pipeline("image-text-to-text", model=model, processor=processor)
    pushed = None
    if task["repository"]:
        model.push_to_hub(task["repository"])
        processor.push_to_hub(task["repository"])
        again = AutoModel.from_pretrained(task["repository"], trust_remote_code=True).eval()
        pushed = again.generate(**inputs, max_new_tokens=limit)[:, length:].tolist()
    answers = {
        "ids": ids.tolist(),
        "uncached": uncached.tolist(),
        "beams": beams.tolist(),
        "pipeline": [
            answer[0]["generated_text"]
            for answer in pipe(text=chats, max_new_tokens=limit, return_full_text=False, batch_size=2)
        ],
        "pushed": pushed,
        "modules": sorted(name for name in sys.modules if name.split(".")[0] == "cobra"),
        "home": type(model).__module__.split(".")[0],
    }
    print(json.dumps(answers))


if __name__ == "__main__":
    main()
