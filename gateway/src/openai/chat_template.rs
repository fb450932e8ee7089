//! [`ChatTemplate`]: a checkpoint's own template that writes a conversation as one text.
//!
//! Templates are Jinja as Hugging Face checkpoints carry it: the file `chat_template.jinja`, or the field `chat_template` of
//! tokenizer_config.json. They come with a checkpoint, which may come from anywhere: rendering is bounded in steps and in text.

use std::io::{self, Write};
use std::path::Path;

use minijinja::{Environment, ErrorKind, context};
use serde::Deserialize;
use serde_json::Value;
use specattn_proto::limits;

use super::prompt::Message;
use crate::args::Config;
use crate::error::GatewayError;

/// Template instructions that one conversation may take.
const FUEL: u64 = 10_000_000;

const NAME: &str = "chat";

/// A compiled template and the words that it may use.
#[derive(Debug)]
pub(super) struct ChatTemplate {
    environment: Environment<'static>,
    bos_token: String,
    eos_token: String,
}

/// What of tokenizer_config.json matters here.
#[derive(Debug, Default, Deserialize)]
#[serde(default)]
struct TokenizerConfig {
    chat_template: Value,
    bos_token: Value,
    eos_token: Value,
}

impl ChatTemplate {
    /// The template that the configuration names, or the checkpoint's own if it has one.
    pub(super) fn find(config: &Config) -> Result<Option<Self>, GatewayError> {
        let folder = &config.tokenizer_dir;
        let words = read_config(&folder.join("tokenizer_config.json"));
        if let Some(path) = &config.http.chat_template {
            let failed = |reason: String| GatewayError::ChatTemplate {
                path: path.clone(),
                reason,
            };
            let source =
                std::fs::read_to_string(path).map_err(|error| failed(error.to_string()))?;
            return Self::compile(source, &words).map(Some).map_err(failed);
        }
        let Some(source) = own_template(folder, &words) else {
            return Ok(None);
        };
        let compiled = Self::compile(source, &words);
        Ok(compiled
            .inspect_err(|reason| {
                tracing::warn!(reason, "the checkpoint's chat template cannot be used")
            })
            .ok())
    }

    fn compile(source: String, words: &TokenizerConfig) -> Result<Self, String> {
        let mut environment = Environment::new();
        // As transformers sets Jinja up.
        environment.set_trim_blocks(true);
        environment.set_lstrip_blocks(true);
        environment
            .set_unknown_method_callback(minijinja_contrib::pycompat::unknown_method_callback);
        environment.add_function("raise_exception", |message: String| -> Result<(), _> {
            Err(minijinja::Error::new(ErrorKind::InvalidOperation, message))
        });
        environment.set_fuel(Some(FUEL));
        environment
            .add_template_owned(NAME, source)
            .map_err(|error| error.to_string())?;
        Ok(Self {
            environment,
            bos_token: word(&words.bos_token),
            eos_token: word(&words.eos_token),
        })
    }

    /// The conversation up to where the model is to answer.
    pub(super) fn render(&self, messages: &[Message]) -> Result<String, String> {
        let template = self
            .environment
            .get_template(NAME)
            .map_err(|error| error.to_string())?;
        let words = context! {
            messages,
            add_generation_prompt => true,
            bos_token => self.bos_token,
            eos_token => self.eos_token,
        };
        let mut text = Bounded(Vec::new());
        template
            .render_captured_to(words, &mut text)
            .map_err(|error| format!("the chat template does not take these messages: {error}"))?;
        String::from_utf8(text.0).map_err(|error| error.to_string())
    }
}

/// Takes as much text as a prompt may hold.
struct Bounded(Vec<u8>);

impl Write for Bounded {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        if self.0.len() + bytes.len() > limits::MAX_PROMPT_BYTES {
            let reason = format!("the text is longer than {} bytes", limits::MAX_PROMPT_BYTES);
            return Err(io::Error::other(reason));
        }
        self.0.extend_from_slice(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

fn read_config(path: &Path) -> TokenizerConfig {
    let Ok(bytes) = std::fs::read(path) else {
        return TokenizerConfig::default();
    };
    serde_json::from_slice(&bytes)
        .inspect_err(|error| tracing::warn!(path = %path.display(), %error, "unreadable"))
        .unwrap_or_default()
}

fn own_template(folder: &Path, config: &TokenizerConfig) -> Option<String> {
    if let Ok(source) = std::fs::read_to_string(folder.join("chat_template.jinja")) {
        return Some(source);
    }
    match &config.chat_template {
        Value::String(source) => Some(source.clone()),
        // Several by name.
        Value::Array(named) => named
            .iter()
            .find(|entry| entry["name"] == "default")
            .and_then(|entry| entry["template"].as_str())
            .map(str::to_owned),
        _ => None,
    }
}

/// A special token is written as a string, or as an object with its content.
fn word(token: &Value) -> String {
    let text = token.as_str().or_else(|| token["content"].as_str());
    text.unwrap_or_default().to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn render(source: &str) -> Result<String, String> {
        let words = TokenizerConfig {
            bos_token: json!({"content": "<s>"}),
            eos_token: json!("</s>"),
            ..TokenizerConfig::default()
        };
        let messages: Vec<Message> = serde_json::from_value(json!([
            {"role": "system", "content": " Be brief. "},
            {"role": "user", "content": "Hello"},
        ]))
        .unwrap();
        ChatTemplate::compile(source.to_owned(), &words)?.render(&messages)
    }

    #[test]
    fn python_methods_loops_and_special_tokens_work() {
        let source = "{{ bos_token }}{% for m in messages %}\n[{{ m['role'].upper() }}] {{ m.content.strip() }}{{ eos_token }}\n\
                      {% endfor %}\n{% if add_generation_prompt %}[A]{% endif %}";
        assert_eq!(
            render(source).unwrap(),
            "<s>[SYSTEM] Be brief.</s>\n[USER] Hello</s>\n[A]"
        );
    }

    #[test]
    fn a_template_may_refuse_and_may_not_run_for_ever() {
        let refused = render("{{ raise_exception('no system turns') }}").unwrap_err();
        assert!(refused.contains("no system turns"), "{refused}");
        let long = "{% for a in range(100000) %}{% for b in range(100000) %}{{ a * b }}{% endfor %}{% endfor %}";
        assert!(render(long).is_err());
        let wide = "{% for a in range(100000) %}{{ 'wide' * 10000 }}{% endfor %}";
        assert!(render(wide).is_err());
    }
}
