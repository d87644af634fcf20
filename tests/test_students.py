"""Students: what they learn, what they keep, and that an interruption costs nothing twice."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file
from worlds import HARD, SMALL, accuracy, student, traffic

from routenlp_plugins import (
    Call,
    ClassifierStudent,
    Course,
    DataError,
    Endpoint,
    HostedStudent,
    Lesson,
    LlamaCppTier,
    LoRAStudent,
    LoRATraining,
    Query,
    ReleaseError,
    Student,
    TierError,
    base_from_gguf,
    load_student,
)
from routenlp_plugins.distill import causal, training
from routenlp_plugins.testing import ScriptedServer
from routenlp_plugins.tiers.llama_cpp import smollm2_path

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")


def hard_lessons(n: int, seed: int = 7) -> tuple[Lesson, ...]:
    return tuple(Lesson.of(query, intent) for query, intent in traffic(n, seed, hard=1.0))


class TestClassifier:
    def test_learns_without_forgetting(self, tmp_path):
        before = student()
        after = before.taught(Course(hard_lessons(200)), tmp_path / "s")
        fresh = traffic(300, seed=8)
        easy = [(query, intent) for query, intent in fresh if intent not in HARD]
        assert accuracy(after, fresh) > accuracy(before, fresh) + 0.15
        assert accuracy(after, easy) >= accuracy(before, easy) - 0.02
        assert after.model != before.model
        assert isinstance(after, Student)

    def test_is_read_back(self, tmp_path):
        after = student().taught(Course(hard_lessons(40)), tmp_path / "s")
        again = load_student(tmp_path / "s")
        assert isinstance(again, ClassifierStudent) and again.model == after.model and again.lessons == after.lessons
        # taught again in the same folder, it is what it was
        assert student().taught(Course(hard_lessons(40)), tmp_path / "s").model == after.model
        with pytest.raises(ReleaseError, match="not overwritten"):
            after.save(tmp_path / "s")

    def test_goes_on_from_its_weights_where_its_lessons_are_not_known(self, tmp_path):
        forgetful = ClassifierStudent(student().tier)
        known = traffic(200, seed=9)
        own = tuple(Lesson.of(query, forgetful(Call(SMALL, query)).text, "rehearsal") for query, _ in known)
        new = (
            *hard_lessons(200),
            *(Lesson(f"n{i}", "intent", f"entirely new thing {i}", "new-label") for i in range(20)),
        )
        after = forgetful.taught(Course(new, own), tmp_path / "s")
        fresh = traffic(300, seed=8)
        assert accuracy(after, fresh) > accuracy(forgetful, fresh)
        assert after(Call(SMALL, Query("entirely new thing 77"))).text == "new-label"
        assert 0 < after(Call(SMALL, fresh[0][0])).confidence <= 1

    def test_updates_two_labels_too(self):
        tier = ClassifierStudent.train(
            [Lesson(str(i), "t", f"{w} {i}", w) for i in range(20) for w in ("yes", "no")]
        ).tier
        after = tier.updated([f"perhaps {i}" for i in range(40)], ["no"] * 40)
        assert after.predict(["perhaps 99"])[0] == ["no"] and after.predict(["yes 3"])[0] == ["yes"]
        with pytest.raises(DataError, match="n > 0 texts"):
            tier.updated([], [])

    def test_a_task_without_labels_is_told(self):
        with pytest.raises(DataError, match="no answer occurs twice"):
            ClassifierStudent.train([Lesson(str(i), "t", f"q {i}", f"answer {i}") for i in range(5)])

    def test_a_folder_that_is_none_is_told(self, tmp_path):
        with pytest.raises(ReleaseError, match=r"student.json: cannot be read"):
            load_student(tmp_path)
        (tmp_path / "student.json").write_text(json.dumps({"format_version": 1, "kind": "parrot"}))
        with pytest.raises(ReleaseError, match="kind must be one of classifier, hosted, lora, got 'parrot'"):
            load_student(tmp_path)

    def test_a_course_has_lessons(self):
        with pytest.raises(DataError, match="no lessons"):
            Course(())


@pytest.fixture(scope="session")
def tiny(tmp_path_factory) -> Path:
    """A Llama of two layers with the tokenizer of SmolLM2."""
    folder = tmp_path_factory.mktemp("tiny")
    with causal.quiet():
        tokenizer = transformers.AutoTokenizer.from_pretrained(smollm2_path().parent, gguf_file=smollm2_path().name)
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=True,
        initializer_range=0.2,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=tokenizer.bos_token_id,
    )
    with causal.quiet():
        transformers.LlamaForCausalLM(config).save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    return folder


FRUIT = {"red": "apple", "yellow": "banana", "green": "lime"}


def fruit(n: int, start: int = 0) -> tuple[Lesson, ...]:
    colours = sorted(FRUIT)
    return tuple(
        Lesson(f"f{i}", "t", f"number {i} is {colours[i % 3]}", FRUIT[colours[i % 3]]) for i in range(start, start + n)
    )


FAST = LoRATraining(epochs=6, batch=8, rate=0.02, patience=6)


class TestLoRA:
    def test_learns_what_it_is_taught_and_is_read_back(self, tiny, tmp_path):
        before = LoRAStudent(tiny, training=FAST, most=4)
        after = before.taught(Course(fruit(240)), tmp_path / "s")
        asked = [lesson.query for lesson in fruit(60, start=1000)]
        wanted = [lesson.answer for lesson in fruit(60, start=1000)]
        said = [answer.text for answer in after.answers(asked, batch=16)]
        assert np.mean([a == b for a, b in zip(said, wanted, strict=True)]) > 0.9
        again = load_student(tmp_path / "s")
        assert isinstance(again, LoRAStudent) and again.model == after.model != before.model
        one = again(Call(SMALL, asked[0]))
        assert one.text == said[0] and one.model == after.model
        assert one.mean_logprob == pytest.approx(np.mean(one.token_logprobs)) and one.output_tokens == len(
            one.token_logprobs
        )
        assert sorted(p.name for p in (tmp_path / "s").iterdir()) == ["adapter", "lessons.jsonl", "student.json"]

    def test_a_batch_says_what_one_after_the_other_says(self, tiny):
        model = LoRAStudent(tiny, most=5)
        asked = [Query("short"), Query("a much longer question " * 8), Query("and another one")]
        together, alone = model.answers(asked, batch=3), [model(Call(SMALL, query)) for query in asked]
        assert [a.text for a in together] == [a.text for a in alone]
        for one, other in zip(together, alone, strict=True):
            assert one.token_logprobs == pytest.approx(other.token_logprobs, abs=1e-4)

    def test_what_it_rehearses_is_learned_too(self, tiny, tmp_path):
        new = tuple(Lesson(f"s{i}", "t", f"number {i} is square", "brick") for i in range(60))
        both = LoRAStudent(tiny, training=FAST, most=4).taught(Course(new, fruit(180)), tmp_path / "both")
        assert both(Call(SMALL, Query("number 900 is square", "t"))).text == "brick"
        asked = fruit(30, start=2000)
        said = both.answers([lesson.query for lesson in asked], batch=30)
        assert np.mean([a.text == lesson.answer for a, lesson in zip(said, asked, strict=True)]) > 0.6
        assert {lesson.id for lesson in both.lessons} == {lesson.id for lesson in new}

    def test_it_is_taught_on_from_its_adapter(self, tiny, tmp_path):
        one = LoRAStudent(tiny, training=FAST, most=4).taught(Course(fruit(60)), tmp_path / "one")
        slowly = replace(one, training=replace(FAST, epochs=1, rate=1e-6))
        two = slowly.taught(Course(fruit(30, start=500)), tmp_path / "two")
        asked = [lesson.query for lesson in fruit(20, start=2000)]
        assert [a.text for a in two.answers(asked, 20)] == [a.text for a in one.answers(asked, 20)]
        assert len(two.lessons) == 90 and two.model != one.model

    def test_stops_when_nothing_gets_better(self, tiny, tmp_path):
        job = tmp_path / "job"
        how = LoRATraining(epochs=40, batch=8, rate=0.5, patience=1, held_out=0.3)
        training.begin(job, tiny, fruit(80), (), how, seed=0)
        began = time.perf_counter()
        training.train(job)
        assert (job / "adapter" / "adapter_model.safetensors").exists()
        assert time.perf_counter() - began < 60

    def test_distributions_of_a_teacher_are_learned(self, tiny, tmp_path):
        course = Course(fruit(120))
        teacher = LoRAStudent(tiny, training=FAST, most=4).taught(course, tmp_path / "teacher")
        merged = tmp_path / "merged"
        with causal.quiet():
            loaded = causal.CausalLM.load(tiny, teacher.adapter)
            loaded.model.merge_and_unload().save_pretrained(merged)
            loaded.tokenizer.save_pretrained(merged)

        def divergence(name: str, logits: float) -> float:
            how = LoRATraining(epochs=2, batch=8, rate=0.01, logits=logits, patience=9)
            taught = LoRAStudent(tiny, training=how, teacher=merged, most=4).taught(course, tmp_path / name)
            query = Query("number 77 is red", "t")
            mine, theirs = (s(Call(SMALL, query)).token_logprobs[0] for s in (taught, teacher))
            return abs(mine - theirs)

        assert divergence("both", 0.9) < 2.0
        with causal.quiet():
            other = transformers.AutoTokenizer.from_pretrained(tiny)
        other.add_tokens(["<another>"])
        other.save_pretrained(merged)
        how = LoRATraining(epochs=1)
        with pytest.raises(DataError, match="its tokenizer is not that of the student"):
            LoRAStudent(tiny, training=how, teacher=merged).taught(course, tmp_path / "wrong")

    def test_a_moved_or_other_base_is_told(self, tiny, tmp_path):
        taught = LoRAStudent(tiny, training=LoRATraining(epochs=1)).taught(Course(fruit(16)), tmp_path / "s")
        facts = json.loads((tmp_path / "s" / "student.json").read_text())
        (tmp_path / "s" / "student.json").write_text(json.dumps({**facts, "base": str(tmp_path / "gone")}))
        with pytest.raises(ReleaseError, match=r"is not there; say where: LoRAStudent.load\(folder, base=...\)"):
            load_student(tmp_path / "s")
        assert LoRAStudent.load(tmp_path / "s", base=tiny).model == taught.model
        with pytest.raises(ReleaseError, match="its weights are not those"):
            LoRAStudent.load(tmp_path / "s", base=taught.adapter)

    def test_another_job_in_the_same_folder_is_refused(self, tiny, tmp_path):
        training.begin(tmp_path, tiny, fruit(8), (), FAST, seed=0)
        training.begin(tmp_path, tiny, fruit(8), (), FAST, seed=0)
        with pytest.raises(DataError, match="another training was begun here"):
            training.begin(tmp_path, tiny, fruit(9), (), FAST, seed=0)
        with pytest.raises(DataError, match=r"a training is begun by begin\(\)"):
            training.train(tmp_path / "nothing")

    def test_the_size_of_the_parts_of_a_step_changes_nothing_but_memory(self, tiny, tmp_path):
        lessons = tuple(replace(lesson, answer="lime " * (1 + i % 5)) for i, lesson in enumerate(fruit(48)))

        def weights(at_once: int) -> np.ndarray:
            how = LoRATraining(epochs=2, batch=8, rate=0.01, dropout=0.0, at_once=at_once)
            taught = LoRAStudent(tiny, training=how).taught(Course(lessons), tmp_path / str(at_once))
            arrays = load_file(taught.adapter / "adapter_model.safetensors")
            return np.concatenate([arrays[name].ravel() for name in sorted(arrays)])

        whole, parts = weights(8), weights(2)
        assert np.abs(whole).max() > 0.01 and parts == pytest.approx(whole, abs=1e-4)

    def test_settings_are_checked(self):
        for bad in ({"epochs": 0}, {"rate": -1}, {"temperature": 0}, {"rank": 2.5}, {"logits": 2}, {"at_once": 3}):
            with pytest.raises(DataError, match="training: "):
                LoRATraining(**bad)

    def test_killed_in_the_middle_it_goes_on_from_its_checkpoint(self, tiny, tmp_path, monkeypatch):
        job = tmp_path / "job"
        training.begin(job, tiny, fruit(120), (), LoRATraining(epochs=6, batch=2, rate=0.01, patience=99), seed=0)
        command = [sys.executable, "-m", "routenlp_plugins.distill.training", str(job)]
        process = subprocess.Popen(command, env=environment())
        while not list((job / "checkpoints").glob("checkpoint-*/trainer_state.json")):
            assert process.poll() is None
            time.sleep(0.05)
        process.send_signal(signal.SIGKILL)
        process.wait()
        assert not (job / "adapter").exists()
        before = max(int(p.name.split("-")[1]) for p in (job / "checkpoints").glob("checkpoint-*"))
        from routenlp_plugins.distill import trainer

        begun: list[int] = []
        original = trainer._Bar.on_train_begin

        def seen(self, args, state, control, **kwargs):
            begun.append(state.global_step)
            original(self, args, state, control, **kwargs)

        monkeypatch.setattr(trainer._Bar, "on_train_begin", seen)
        training.train(job)
        # the last checkpoint may have been half written
        assert 0 < begun[0] <= before
        assert (job / "adapter" / "adapter_config.json").exists() and not (job / "checkpoints").exists()

    def test_the_same_script_runs_under_accelerate(self, tiny, tmp_path):
        job = tmp_path / "job"
        training.begin(job, tiny, fruit(32), (), LoRATraining(epochs=1), seed=0)
        launch = Path(sys.executable).with_name("accelerate")
        command = [launch, "launch", "--cpu", "--num_processes=2", "--num_machines=1", "--mixed_precision=no"]
        command += ["--dynamo_backend=no", "-m", "routenlp_plugins.distill.training", job]
        done = subprocess.run(command, env=environment(), capture_output=True, text=True, check=False, timeout=170)
        assert done.returncode == 0, done.stderr[-2000:]
        assert (job / "adapter" / "adapter_config.json").exists()


def environment() -> dict[str, str]:
    return {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}


class TestGGUF:
    def test_a_merged_student_says_the_same_in_llama_cpp(self, tmp_path):
        base = base_from_gguf(smollm2_path(), tmp_path / "base")
        from peft import LoraConfig, get_peft_model

        with causal.quiet():
            model = causal.CausalLM.load(base).model
            torch.manual_seed(0)
            # an adapter that changes what is said
            adapted = get_peft_model(
                model, LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False, lora_alpha=1)
            )
            adapted.save_pretrained(tmp_path / "adapter")
        taught = LoRAStudent(base, tmp_path / "adapter", most=8)
        file = taught.export_gguf(smollm2_path(), tmp_path / "merged.gguf", "F32")
        tier = LlamaCppTier(file, context_window=256, request={"max_tokens": 8})
        for text in ("Where is my card?", "Name a colour.", "The bank closes at"):
            query = Query(text)
            mine, theirs = taught(Call(SMALL, query)), tier(Call(SMALL, query))
            n = min(len(mine.token_logprobs), len(theirs.token_logprobs), 6)
            assert n and mine.text[:10] == theirs.text.strip()[:10]
            assert mine.token_logprobs[:n] == pytest.approx(theirs.token_logprobs[:n], abs=0.02)
        with pytest.raises(ReleaseError, match="not overwritten"):
            taught.export_gguf(smollm2_path(), file)
        with pytest.raises(DataError, match="kind must be one of"):
            taught.export_gguf(smollm2_path(), tmp_path / "x.gguf", "Q2")

    def test_a_model_of_another_shape_is_refused(self, tiny, tmp_path):
        with pytest.raises(DataError, match=r"token_embd\.weight: expected shape"):
            LoRAStudent(tiny).export_gguf(smollm2_path(), tmp_path / "x.gguf")
        with pytest.raises(DataError, match="no such GGUF file"):
            LoRAStudent(tiny).export_gguf(tmp_path / "none.gguf", tmp_path / "x.gguf")
        assert not list(tmp_path.glob("*.gguf"))


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "none")
    with ScriptedServer(lambda request: "who knows") as running:
        yield running


def hosted(server: ScriptedServer) -> HostedStudent:
    endpoint = Endpoint(server.url, usd_per_mtok=3.0, interval=0.01)
    return HostedStudent("small-1", "small-1", endpoint, (Lesson("g", "t", "hello", "hi", "given"),))


class TestHosted:
    def test_is_fine_tuned_through_the_api_and_answers(self, server, tmp_path):
        before = hosted(server)
        course = Course((Lesson("a", "t", "What is it?", "A card."),), seed=5)
        after = before.taught(course, tmp_path / "s")
        assert after.name == "ft:small-1:ftjob-0" and isinstance(after, Student)
        assert before(Call(SMALL, Query("What is it?"))).text == "who knows"
        assert after(Call(SMALL, Query("What is it?"))).text == "A card."
        # what it knew is taught again with it
        assert after(Call(SMALL, Query("hello"))).text == "hi"
        (job,) = server.tuning.jobs.values()
        assert job["seed"] == 5 and after.training_usd == pytest.approx(job["trained_tokens"] * 3 / 1e6)
        again = load_student(tmp_path / "s")
        assert isinstance(again, HostedStudent) and again.name == after.name and again.lessons == after.lessons
        assert "none" not in (tmp_path / "s" / "student.json").read_text()

    def test_an_interrupted_job_is_waited_for_and_not_paid_twice(self, server, tmp_path):
        server.tuning.looks = 10**6
        course = Course((Lesson("a", "t", "What is it?", "A card."),))
        (tmp_path / "s").mkdir()
        job = hosted(server)._begun(tmp_path / "s", course.lessons, 0)
        # the answer to the request was lost
        (tmp_path / "s" / "job.json").write_text(json.dumps({"file": "file-0"}))
        server.tuning.looks = 2
        after = hosted(server).taught(course, tmp_path / "s")
        assert list(server.tuning.jobs) == [job] and list(server.tuning.files) == ["file-0"]
        assert after.name.endswith(job)

    def test_a_job_that_fails_is_told_and_begun_anew(self, server, tmp_path):
        server.tuning.failure = "too few examples"
        course = Course((Lesson("a", "t", "What is it?", "A card."),))
        with pytest.raises(TierError, match="fine-tuning job ftjob-0 of 'small-1' failed: too few examples"):
            hosted(server).taught(course, tmp_path / "s")
        server.tuning.failure = None
        assert hosted(server).taught(course, tmp_path / "s").name == "ft:small-1:ftjob-1"
