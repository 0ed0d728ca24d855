// The stream for screen readers: whole phrases, since single tokens would interrupt each other.

const PAUSE_MS = 1500;

export class Speaker {
  constructor(element) {
    Object.assign(this, { element, text: "", timer: 0 });
  }

  begin() {
    this.element.textContent = "";
    this.text = "";
    this.timer = setInterval(() => this.flush(), PAUSE_MS);
  }

  add(text) {
    this.text += text;
  }

  flush() {
    const end = this.text.search(/\s\S*$/);
    if (end > 0) this.say(end);
  }

  end(outcome) {
    clearInterval(this.timer);
    this.say(this.text.length);
    this.element.append(` Ended: ${outcome}.`);
  }

  say(length) {
    this.element.append(this.text.slice(0, length));
    this.text = this.text.slice(length);
  }
}
