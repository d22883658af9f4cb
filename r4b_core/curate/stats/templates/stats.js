(function () {
  "use strict";
  var samples = JSON.parse(document.getElementById("data").textContent).samples;
  var pickKind = document.getElementById("pick-kind");
  var pickRecord = document.getElementById("pick-record");
  var place = document.getElementById("record");

  function element(tag, className, text) {
    var made = document.createElement(tag);
    if (className) { made.className = className; }
    if (text !== undefined) { made.textContent = text; }
    return made;
  }

  function kindOf(sample) {
    return sample.reason === null ? "kept by " + sample.stage : sample.stage + ": " + sample.reason;
  }

  function tags(sample) {
    var row = element("div", "tags");
    function add(text, className) { row.append(element("span", "tag " + (className || ""), text)); }
    if (sample.reason !== null) { add(sample.stage + ": " + sample.reason, "stopped"); }
    if (sample.verdict) {
      add("verdict: " + sample.verdict + (sample.verdict_reason ? " (" + sample.verdict_reason + ")" : ""), sample.verdict);
    }
    if (sample.rate) { add("student " + sample.rate[0] + " of " + sample.rate[1] + " right"); }
    if (sample.mode) { add(sample.mode); }
    if (sample.tokens) { add(sample.tokens + " tokens"); }
    if (sample.finish && sample.finish !== "stop") { add("finish: " + sample.finish, "wrong"); }
    return row;
  }

  function response(text) {
    var made = element("pre");
    var close = text.indexOf("</think>");
    if (close < 0) {
      made.textContent = text;
      return made;
    }
    made.append(element("span", "reasoning", text.slice(0, close + 8)), text.slice(close + 8));
    return made;
  }

  function part(title, body) {
    var made = element("div", "card");
    made.append(element("h3", "", title), body);
    return made;
  }

  function show() {
    var sample = chosen()[pickRecord.selectedIndex];
    place.replaceChildren();
    if (!sample) { return; }
    var whole = element("div", "record");
    whole.append(tags(sample));
    var asked = element("div", "question");
    if (sample.images && sample.images.length) {
      var images = element("div", "images");
      sample.images.forEach(function (source) {
        var image = element("img");
        image.alt = "image of the question";
        image.src = source;
        images.append(image);
      });
      asked.append(images);
    }
    var text = element("div", "asked");
    text.append(element("p", "meta", [sample.source, sample.id, sample.place].filter(Boolean).join(" · ")));
    if (sample.question) { text.append(element("p", "", sample.question)); }
    if (sample.detail) { text.append(element("p", "meta", sample.detail)); }
    if (sample.answer) {
      var answer = element("p", "", "Reference answer: ");
      answer.append(element("b", "", sample.answer));
      text.append(answer);
    }
    if (sample.extracted) {
      var found = element("p", "", "Answer found: ");
      found.append(element("b", "", sample.extracted));
      text.append(found);
    }
    asked.append(text);
    whole.append(asked);
    if (sample.caption) { whole.append(part("Caption", element("pre", "", sample.caption))); }
    if (sample.response) { whole.append(part("Response", response(sample.response))); }
    place.append(whole);
  }

  var kinds = Array.from(new Set(samples.map(kindOf)));

  function chosen() {
    return samples.filter(function (sample) { return kindOf(sample) === kinds[pickKind.selectedIndex]; });
  }

  function fill() {
    pickRecord.replaceChildren();
    chosen().forEach(function (sample) { pickRecord.append(element("option", "", sample.source + " · " + sample.id)); });
    show();
  }

  function move(by) {
    var count = chosen().length;
    pickRecord.selectedIndex = (pickRecord.selectedIndex + by + count) % count;
    show();
  }

  kinds.forEach(function (kind) {
    var count = samples.filter(function (sample) { return kindOf(sample) === kind; }).length;
    pickKind.append(element("option", "", kind + " (" + count + ")"));
  });
  if (!kinds.length) { place.append(element("p", "missing", "There is nothing to show.")); }
  pickKind.addEventListener("change", fill);
  pickRecord.addEventListener("change", show);
  document.getElementById("previous").addEventListener("click", function () { move(-1); });
  document.getElementById("next").addEventListener("click", function () { move(1); });
  fill();
  document.documentElement.setAttribute("data-ready", "true");
})();
