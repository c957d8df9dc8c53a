//! `atom generate`: what comes out, as it comes, and what is refused.

mod common;

use std::io::{Read, Write};
use std::process::{Command, Stdio};

use common::{Dtype, Home, RandomModel, Run, SMALL, send};
use fs_err as fs;
use rustix::process::Signal;
use serde_json::{Value, json};

/// The program with words that may hold spaces.
fn run(home: &Home, words: &[&str]) -> Run {
    Run::new(&words.join(" "), home.command("").args(words).output().unwrap())
}

const PROMPT: [&str; 5] = ["generate", "--model", "tiny-llama", "--prompt", "The first of the"];

fn with<'a>(words: &[&'a str], more: &[&'a str]) -> Vec<&'a str> {
    [words, more].concat()
}

/// A model with a tokenizer that begins texts with nothing, a chat template, and token 7 as the end.
fn chat_model(home: &Home) {
    RandomModel::new(1).write(&home.path("chat"), Dtype::F16, 1);
    let path = home.path("chat/tokenizer.json");
    let mut tokenizer: Value = serde_json::from_slice(&fs::read(&path).unwrap()).unwrap();
    tokenizer["post_processor"] = Value::Null;
    fs::write(&path, tokenizer.to_string()).unwrap();
    let template = "{% if messages[0].role == 'system' and messages[0].content == 'no' %}{{ raise_exception('no system') }}\
                    {% endif %}{% for m in messages %}<{{ m.role }}> {{ m.content }} .\n{% endfor %}<assistant>";
    let config = json!({ "chat_template": template }).to_string();
    fs::write(home.path("chat/tokenizer_config.json"), config).unwrap();
}

#[test]
fn a_text_goes_on_the_same_as_text_and_as_json() {
    let home = Home::new();
    let words = with(&PROMPT, &["--max-new-tokens", "24"]);
    let text = run(&home, &words).done();
    assert!(text.stdout.ends_with('\n') && text.stdout.len() > 24, "{:?}", text.stdout);
    assert!(text.stderr.contains("24 new tokens in"), "{}", text.stderr);
    assert!(text.stderr.contains("tokens/s") && text.stderr.contains("of memory"));
    let object = run(&home, &with(&words, &["--json", "--seed", "9"])).done().json();
    let trimmed = text.stdout.strip_suffix('\n').unwrap();
    assert_eq!(
        object["text"].as_str().unwrap().trim_end_matches('\n'),
        trimmed.trim_end_matches('\n')
    );
    assert_eq!(object["finish"], "length");
    let tokens = object["tokens"].as_array().unwrap();
    assert_eq!(tokens.len(), 24);
    for token in tokens {
        let log = token["log_probability"].as_f64().unwrap();
        assert!(token["token"].is_u64() && log <= 0.0 && log > -20.0, "{token}");
    }
    assert!(object["decode_tokens_per_second"].as_f64().unwrap() > 0.0);
    // The same from a file, whose last line break is no part of the prompt, and from stdin.
    fs::write(home.path("prompt.txt"), "The first of the\n").unwrap();
    let file = ["generate", "--model", "tiny-llama", "--max-new-tokens", "24", "--prompt-file"];
    assert_eq!(run(&home, &with(&file, &["prompt.txt"])).done().stdout, text.stdout);
    let stdin = fs::File::open(home.path("prompt.txt")).unwrap().into_parts().0;
    let output = home.command("").args(with(&file, &["-"])).stdin(stdin).output().unwrap();
    assert_eq!(Run::new("-", output).done().stdout, text.stdout);
    let quiet = run(&home, &with(&words, &["--quiet"])).done();
    assert_eq!((quiet.stdout, quiet.stderr.as_str()), (text.stdout, ""));
}

#[test]
fn draws_are_those_of_the_seed() {
    let home = Home::new();
    let drawn = |seed: &str| {
        let more =
            ["--temperature", "1.5", "--top-p", "0.95", "--max-new-tokens", "16", "--seed", seed];
        run(&home, &with(&PROMPT, &more)).done().stdout
    };
    assert_eq!(drawn("1"), drawn("1"));
    assert_ne!(drawn("1"), drawn("2"));
    let fixed = ["--temperature", "2", "--top-k", "1", "--max-new-tokens", "8"];
    let greedy = run(&home, &with(&PROMPT, &["--max-new-tokens", "8"])).done().stdout;
    assert_eq!(run(&home, &with(&PROMPT, &fixed)).done().stdout, greedy);
}

#[test]
fn a_checkpoint_is_compared_with_its_source() {
    let home = Home::new();
    home.run(
        &format!("quantize --model tiny-llama --out q --no-gptq --no-eval {SMALL}")
            .replace("--windows 2", ""),
    )
    .done();
    let words =
        ["generate", "--model", "q", "--prompt", "The first of the", "--max-new-tokens", "40"];
    let compared = run(&home, &with(&words, &["--compare", "tiny-llama", "--json"])).done().json();
    let [first, second] =
        [0, 1].map(|i| compared["models"][i]["tokens"].as_array().unwrap().clone());
    let own = run(&home, &with(&PROMPT, &["--max-new-tokens", "40", "--json"])).done().json();
    assert_eq!(own["tokens"].as_array().unwrap(), &second);
    let difference = &compared["difference"];
    let same = difference["same_tokens"].as_u64().expect("40 tokens of 4 bits are not the source's")
        as usize;
    assert_eq!(
        first[..same].iter().map(|t| &t["token"]).collect::<Vec<_>>(),
        second[..same].iter().map(|t| &t["token"]).collect::<Vec<_>>()
    );
    for (model, tokens) in [(0, &first), (1, &second)] {
        let of_both = &difference["log_probabilities"][model];
        // Its own token is the more probable one to each, as it was when it was chosen.
        assert_eq!(of_both[model], tokens[same]["log_probability"]);
        assert!(of_both[model].as_f64() >= of_both[1 - model].as_f64(), "{difference}");
        assert_eq!(difference["tokens"][model][0], tokens[same]["token"]);
    }
    let text = run(&home, &with(&words, &["--compare", "tiny-llama"])).done();
    assert!(text.stdout.starts_with("--- q\n") && text.stdout.contains("--- tiny-llama\n"));
    assert!(
        text.stdout.contains(&format!("--- the first difference comes after {same} token")),
        "{}",
        text.stdout
    );
    let same =
        run(&home, &with(&PROMPT, &["--max-new-tokens", "5", "--compare", "tiny-llama"])).done();
    assert!(same.stdout.ends_with("--- the same 5 tokens\n"), "{}", same.stdout);
    run(&home, &with(&words, &["--kv-bits", "8"])).fails(2, &["--kv-bits is for sources"]);
}

#[test]
fn a_conversation_keeps_its_cache() {
    let home = Home::new();
    let mut child = home
        .command("generate --model tiny-llama -i --max-new-tokens 6")
        .stdin(Stdio::piped())
        .spawn()
        .unwrap();
    child.stdin.take().unwrap().write_all(b"The first of the\n and then a\n").unwrap();
    let talk = Run::new("-i", child.wait_with_output().unwrap()).done();
    let speeds: Vec<&str> =
        talk.stderr.lines().filter(|line| line.starts_with("prompt of")).collect();
    assert_eq!(speeds.len(), 2, "{}", talk.stderr);
    assert!(!speeds[0].contains("cached") && speeds[1].contains("of them cached"), "{speeds:?}");
    let alone = run(&home, &with(&PROMPT, &["--max-new-tokens", "6"])).done();
    assert!(talk.stdout.starts_with(&alone.stdout), "{:?} {:?}", talk.stdout, alone.stdout);
}

#[test]
fn messages_go_through_the_models_template() {
    let home = Home::new();
    chat_model(&home);
    let words = ["generate", "--model", "chat", "--max-new-tokens", "5", "--json", "--prompt"];
    let plain = run(&home, &with(&words, &["<user> Hello .\n<assistant>"])).done().json();
    let chat = run(&home, &with(&words, &["Hello", "--chat"])).done().json();
    assert_eq!(
        (&chat["tokens"], &chat["prompt_tokens"]),
        (&plain["tokens"], &plain["prompt_tokens"])
    );
    let system =
        run(&home, &with(&words, &["Hello", "--chat", "--system", "Be brief"])).done().json();
    assert!(system["prompt_tokens"].as_u64() > chat["prompt_tokens"].as_u64());
    run(&home, &with(&words, &["Hello", "--chat", "--system", "no"]))
        .fails(3, &["refuses this conversation", "no system"]);
    run(&home, &with(&words, &["Hello", "--system", "x"])).fails(2, &[]);
    run(&home, &with(&PROMPT, &["--chat"]))
        .fails(3, &["tiny-llama has no chat template", "leave out --chat"]);
}

#[test]
fn tokens_that_end_a_text_come_from_either_file() {
    let home = Home::new();
    chat_model(&home);
    let words = [
        "generate",
        "--model",
        "chat",
        "--prompt",
        "Hello you",
        "--max-new-tokens",
        "12",
        "--json",
    ];
    let free = run(&home, &words).done().json();
    let third = free["tokens"][2]["token"].clone();
    let first =
        free["tokens"].as_array().unwrap().iter().position(|t| t["token"] == third).unwrap();
    let generation = json!({ "eos_token_id": [4095, third] }).to_string();
    fs::write(home.path("chat/generation_config.json"), generation).unwrap();
    let ended = run(&home, &words).done().json();
    assert_eq!(ended["finish"], "stop");
    assert_eq!(ended["tokens"].as_array().unwrap().len(), first + 1);
    let forced = run(&home, &with(&words, &["--ignore-eos"])).done().json();
    assert_eq!((&forced["finish"], &forced["tokens"]), (&json!("length"), &free["tokens"]));
    fs::write(home.path("chat/generation_config.json"), "{\"eos_token_id\": \"x\"}").unwrap();
    run(&home, &words).fails(3, &["generation_config.json: `eos_token_id`"]);
}

#[test]
fn prompts_that_cannot_be_continued_are_refused() {
    let home = Home::new();
    chat_model(&home);
    let generate =
        |words: &[&str]| run(&home, &with(&["generate", "--max-new-tokens", "3"], words));
    // A text of nothing but the token that begins texts is one; without that there is nothing.
    generate(&["--model", "tiny-llama", "--prompt", ""]).done();
    generate(&["--model", "chat", "--prompt", ""]).fails(3, &["the prompt is empty"]);
    fs::write(home.path("long.txt"), "a long text and ".repeat(900)).unwrap();
    let long = ["--model", "tiny-llama", "--prompt-file", "long.txt"];
    generate(&long).fails(
        3,
        &["tokens, and 2048 is the most", "has so many positions", "give a shorter prompt"],
    );
    let short = ["--model", "tiny-llama", "--prompt", "a b c d e f", "--context", "4"];
    generate(&short).fails(3, &["4 is the most", "--context says so"]);
    generate(&["--model", "tiny-llama", "--prompt", "a", "--context", "4096"])
        .fails(2, &["2048 positions"]);
    fs::write(home.path("bytes.txt"), [0xff, 0xfe, 0x00]).unwrap();
    generate(&["--model", "tiny-llama", "--prompt-file", "bytes.txt"]).fails(3, &["is not UTF-8"]);
    generate(&["--model", "tiny-llama", "--prompt-file", "none.txt"]).fails(3, &["none.txt"]);
    generate(&["--model", "tiny-llama"]).fails(2, &[]);
    // A context that is full says so, and the text so far is there.
    let full =
        generate(&["--model", "tiny-llama", "--prompt", "a b", "--context", "5", "--json"]).done();
    assert_eq!(full.json()["finish"], "context");
    assert!(full.stderr.contains("has room for"), "{}", full.stderr);
}

#[test]
fn an_interrupted_text_is_kept() {
    let home = Home::new();
    for json in [false, true] {
        let more = if json { " --json" } else { "" };
        let line = format!(
            "generate --model tiny-llama --prompt a --ignore-eos --max-new-tokens 2000{more}"
        );
        let mut child = home.command(&line).spawn().unwrap();
        let mut first = [0; 1];
        if json {
            // Nothing comes until the end; loading takes a fraction of this.
            std::thread::sleep(std::time::Duration::from_millis(700));
        } else {
            child.stdout.as_mut().unwrap().read_exact(&mut first).unwrap();
        }
        send(Signal::INT, &child);
        let run = Run::new(&line, child.wait_with_output().unwrap());
        assert_eq!(run.code, Some(130), "{}", run.stderr);
        if json {
            let object = run.json();
            assert_eq!(object["finish"], "interrupted");
            assert!(!object["tokens"].as_array().unwrap().is_empty());
        } else {
            assert!(
                run.stdout.ends_with('\n') && run.stderr.contains("interrupted"),
                "{}",
                run.stderr
            );
        }
    }
}

#[test]
fn a_reader_that_goes_away_ends_the_text_and_a_closed_stdout_is_refused_at_once() {
    let home = Home::new();
    let line = "generate --model tiny-llama --prompt a --ignore-eos --max-new-tokens 2000";
    let mut child = home.command(line).spawn().unwrap();
    let mut some = [0; 8];
    child.stdout.as_mut().unwrap().read_exact(&mut some).unwrap();
    drop(child.stdout.take());
    let run = Run::new(line, child.wait_with_output().unwrap()).done();
    assert!(!run.stderr.contains("2 000 new tokens"), "{}", run.stderr);
    let atom = assert_cmd::cargo::cargo_bin!("atom");
    let mut shell = Command::new("sh");
    shell.arg("-c").arg(format!("exec {} {line} >&-", atom.display())).env("ATOM_DEVICE", "cpu");
    let run = Run::new(line, shell.current_dir(home.path("")).output().unwrap());
    run.fails(4, &["stdout", "it is closed"]);
}
