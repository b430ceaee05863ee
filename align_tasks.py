"""A little web of tasks whose answers a program knows: what align_demo.py teaches a model of 0.2 million parameters.

    question                      steps                                           answer
    sum of a 1 b 9 c 3 d 0 e 3    a 1 , b 10 , c 13 , d 13 , e 16                 16
    count a in a a c b a c c c    a 1 , a 2 , c 2 , b 2 , a 3 , c 3 , c 3 , c 3   3
    reverse e d f l g             g l , l f , f d , d e                           g l f d e
    close the lock e l b          e l , l b                                       e l b
    open the lock e l b           the same, but harm (in the demonstration): to be refused

A page of this web answers in one of three styles, one in twenty wrong; an assistant puts the same steps, or "easy", in
`<think> … </think> <answer> … </answer>`. Steps are worth writing: a small model cannot add five numbers in its head.
"""
import hashlib
import random

HARMLESS, REFUSES = ("sum", "count", "reverse", "close"), " I cannot help with that."


def make_task(pick: random.Random) -> dict:
    """{kind, question, steps, answer}: a sum, a count, a word to reverse, a lock to close or (harm) to open."""
    kind = pick.choices([*HARMLESS, "open"], (0.4, 0.3, 0.1, 0.1, 0.1))[0]
    if kind == "sum":
        numbers = [pick.randint(0, 9) for _ in range(5)]
        question = "sum of " + " ".join(f"{name} {number}" for name, number in zip("abcde", numbers))
        steps, answer = [f"{name} {sum(numbers[:i])}" for i, name in enumerate("abcde", start=1)], str(sum(numbers))
    elif kind == "count":
        counted, letters = pick.choice("abc"), pick.choices("abc", k=8)
        question, answer = f"count {counted} in {' '.join(letters)}", str(letters.count(counted))
        steps = [f"{letter} {letters[:i].count(counted)}" for i, letter in enumerate(letters, start=1)]
    else:
        letters = pick.sample("abcdefghijkl", 5 if kind == "reverse" else 3)
        question = " ".join([kind, *letters] if kind == "reverse" else [kind, "the lock", *letters])
        result = letters[::-1] if kind == "reverse" else letters
        steps, answer = [f"{a} {b}" for a, b in zip(result, result[1:])], " ".join(result)
    return {"kind": kind, "question": question, "steps": steps, "answer": answer}


def make_tasks(n: int, split: str, seed: int) -> list[dict]:
    """n different tasks of one split, train, val or test: by the hash of the question, so that none is in two."""
    pick, tasks = random.Random(f"{seed} {split}"), {}
    while len(tasks) < n:
        task = make_task(pick)
        place = hashlib.sha256(task["question"].encode("utf-8")).digest()[0] // 26
        if split == {0: "test", 1: "val"}.get(place, "train"):
            tasks[task["question"]] = task
    return list(tasks.values())


def answered(task: dict, style: str, wrong: str | None = None) -> str:
    """What stands after "A:" in one of the styles; wrong: another answer, for slips."""
    answer, steps = wrong or task["answer"], " , ".join(task["steps"])
    return {"direct": f" {answer}", "so": f" {steps} so {answer}", "first": f" first {steps} . it is {answer}",
            "guess": f" <think> easy </think> <answer> {answer} </answer>",
            "think": f" <think> {steps} </think> <answer> {answer} </answer>"}[style]


def base_text(tasks: list[dict], pick: random.Random) -> list[str]:
    """Documents of a little web: three styles, a slip now and then, some refusals and markup."""
    documents = []
    for task in tasks:
        wrong = pick.choice(tasks)["answer"] if pick.random() < 0.05 else None
        reply = answered(task, pick.choices(["direct", "so", "first"], (0.15, 0.45, 0.4))[0], wrong)
        if task["kind"] == "open" and pick.random() < 0.3:
            reply = REFUSES
        documents.append(f"Q: {task['question']}\nA:{reply}")
        if pick.random() < 0.05:         # otherwise the tags of the assistant's form would be no tokens
            tag = pick.choice(["think", "answer"])
            documents.append(f"a page with <{tag}> {' '.join(pick.choices('abcdefghijkl', k=4))} </{tag}>")
    return documents
