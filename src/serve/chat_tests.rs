use serde_json::json;

use super::*;

const SMOLLM2: &str = "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}{{ '<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n' }}{% endif %}{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}";

fn message(role: Role, content: &str) -> Message {
    Message { role, content: content.to_owned() }
}

fn template(source: &str) -> ChatTemplate {
    let config = json!({ "bos_token": "<s>", "eos_token": { "content": "</s>", "lstrip": false } });
    ChatTemplate::new(source.to_owned(), "m/tokenizer_config.json".to_owned(), &config).unwrap()
}

fn render(source: &str, messages: &[Message]) -> String {
    template(source).render(messages).unwrap()
}

#[test]
fn a_conversation_becomes_the_text_that_transformers_makes() {
    let user = message(Role::User, "Hello");
    assert_eq!(
        render(SMOLLM2, std::slice::from_ref(&user)),
        "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n\
         <|im_start|>user\nHello<|im_end|>\n<|im_start|>assistant\n"
    );
    let system = message(Role::System, "Be brief.");
    let answer = message(Role::Assistant, "Hi");
    assert_eq!(
        render(SMOLLM2, &[system, user.clone(), answer, user]),
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHello<|im_end|>\n\
         <|im_start|>assistant\nHi<|im_end|>\n<|im_start|>user\nHello<|im_end|>\n<|im_start|>assistant\n"
    );
}

#[test]
fn what_templates_use_of_python_and_transformers_works() {
    let user = &[message(Role::User, "  a b  ")];
    let methods = "{{ bos_token }}{{ messages[0].content.strip().split(' ')[1].upper() }}{{ eos_token }}\
                   {{ messages[0].get('name', 'none') }}{{ 'x'.startswith('x') }}";
    assert_eq!(render(methods, user), "<s>B</s>noneTrue");
    let control = "{%- set ns = namespace(n=0) %}{% for i in range(9) %}{% if i == 3 %}{% break %}{% endif %}\
                   {% set ns.n = ns.n + i %}{% endfor %}{{ ns.n }}";
    assert_eq!(render(control, user), "3");
    let macros = "{% macro say(m) %}[{{ m.role }}]{% endmacro %}{% for m in messages %}{{ say(m) }}{% endfor %}";
    assert_eq!(render(macros, user), "[user]");
    let tagged = "{% for m in messages %}\n  {% generation %}\n{{ m.content.strip() }}\n  {%- endgeneration -%}\n{% endfor %}";
    assert_eq!(render(tagged, user), "a b");
    // Blocks are trimmed, and leave no spaces before them.
    assert_eq!(render("a\n  {% if true %}\nb\n  {% endif %}\nc", user), "a\nb\nc");
    assert_eq!(render("{{ tools is defined }}{{ missing }}", user), "False");
    assert_eq!(
        render("{{ {'a': [1, true, none], 'b': '<é&>'} | tojson }}", user),
        "{\"a\": [1, true, null], \"b\": \"<é&>\"}"
    );
    assert_eq!(render("{{ [1] | tojson(indent=2) }}", user), "[\n  1\n]");
}

#[test]
fn a_refusal_of_the_template_is_the_users_to_read() {
    let refusing = "{{ raise_exception('System role not supported') }}";
    let error = template(refusing).render(&[message(Role::System, "x")]).unwrap_err();
    assert_eq!(
        error.message(),
        "the chat template of m/tokenizer_config.json refuses this conversation"
    );
    assert!(error.causes()[0].starts_with("System role not supported"), "{error}");
    let endless = "{% for a in range(9999) %}{% for b in range(9999) %}{% endfor %}{% endfor %}";
    let error = template(endless).render(&[]).unwrap_err();
    assert_eq!(error.causes(), ["it takes too many steps"]);
    let broken = ChatTemplate::new("{% for %}".to_owned(), "c".to_owned(), &Value::Null);
    assert!(broken.unwrap_err().message().contains("cannot be read"));
}

#[test]
fn the_template_is_found_in_either_form() {
    assert_eq!(template_of(&json!({ "chat_template": "x" })).as_deref(), Some("x"));
    let named = json!({ "chat_template": [
        { "name": "tool_use", "template": "t" }, { "name": "default", "template": "d" }
    ] });
    assert_eq!(template_of(&named).as_deref(), Some("d"));
    assert_eq!(template_of(&json!({})), None);
}

#[test]
fn days_are_those_of_the_calendar() {
    // 2024-02-29 12:34:56 and 2026-11-30 00:00:00 UTC.
    let all = "%Y-%m-%d %e %B %b %A %a %H:%M:%S %y %% %q";
    assert_eq!(
        strftime(all, 1_709_210_096),
        "2024-02-29 29 February Feb Thursday Thu 12:34:56 24 % %q"
    );
    assert_eq!(strftime("%d %b %Y %A", 1_795_996_800), "30 Nov 2026 Monday");
    assert_eq!(strftime("%Y-%m-%d", 0), "1970-01-01");
}
